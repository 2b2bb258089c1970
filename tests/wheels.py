"""Builds the wheel and installs it with each extra into an empty environment: `python -m tests.wheels [EXTRA...]`, `make wheels`.

Owns: the checks of a release that take too long for `make test`. The wheel is built from the source distribution and holds our two
packages, nothing else. Every module that an extra promises is imported in an environment with that extra alone. A client without
extras writes to and reads from a node of another environment. Invariants: nothing is left behind, in the checkout or elsewhere;
every command has a time limit; at most two environments are on disk at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.packages import BASE, EXTRAS, PROJECT, ROOT, SHIPPED, promised, requirements

_COMMAND_S_MAX: Final = 900
_FREE_BYTES_MIN: Final = 10 << 30
"""Two of the largest environments, the archives and the copies that pip makes."""
_TOLD_CHARS_MAX: Final = 4_000
_SOURCES: Final = ("pyproject.toml", "README.md", "LICENSE", "attnstore", "worker")
_COMMANDS: Final = {BASE: "attnstore", "worker": "attnstore-worker"}

_BUILD = "from setuptools import build_meta; print(build_meta.build_sdist({folder!r}))"
_IMPORT = """
import importlib, json, sys, time
began = time.perf_counter()
import attnstore
alone = time.perf_counter() - began
for name in json.load(sys.stdin):
    importlib.import_module(name)
print(json.dumps([alone, time.perf_counter() - began]))
"""
_WRITE_AND_READ = """
import attnstore, doctest, sys
failed, tried = doctest.testmod(attnstore, extraglobs={"store_url": sys.argv[1]})
sys.exit(failed or not tried)
"""
_SERVE = """
import subprocess, sys
from attnstore.testing.node import StoreProcess
with StoreProcess("--capacity", "64MiB") as node:
    sys.exit(subprocess.run([*sys.argv[1:], node.url], timeout=60).returncode)
"""


class Broken(Exception):
    """The wheel or an environment is not what it should be; the message says how."""


@dataclass(frozen=True)
class Installed:
    """An environment with one extra; the seconds that `import attnstore` and all promised modules take there, once compiled."""

    extra: str
    packages: int
    mib: float
    modules: int
    client_s: float
    all_s: float

    def __str__(self) -> str:
        name = f"attnstore[{self.extra}]" if self.extra else "attnstore"
        return f"{name:24}{self.packages:>9}{self.mib:>9.0f}{self.modules:>9}{self.client_s:>10.2f}{self.all_s:>8.1f}"


class Environment:
    """An empty virtual environment in `folder`, without pip, and what is installed into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.python = folder / "bin" / "python"
        _run(sys.executable, "-m", "venv", "--without-pip", folder)

    def install(self, *wanted: str) -> None:
        """Installs with this Python's pip and the pinned versions."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--quiet", "--disable-pip-version-check")
        _run(*pip, "install", "--no-cache-dir", "--no-compile", "-c", ROOT / "constraints.txt", *wanted)

    def run(self, *command: str | Path, given: str | None = None) -> str:
        """The output of this environment's Python, which sees none of the checkout but `experiments`."""
        return _run(self.python, *command, given=given, cwd=self._folder, PYTHONPATH=str(self._folder / "beside"))

    def program(self, name: str, *arguments: str) -> str:
        """The output of an installed program."""
        return _run(self.python.parent / name, *arguments, cwd=self._folder)

    def add_experiments(self) -> None:
        """They are run from a checkout."""
        shutil.copytree(ROOT / "experiments", self._folder / "beside" / "experiments")

    def packages(self) -> int:
        """How many distributions are installed."""
        return int(self.run("-c", "import importlib.metadata as m; print(len({each.name for each in m.distributions()}))"))

    def mib(self) -> float:
        """What they take on disk."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file() and not path.is_symlink()) / (1 << 20)

    def remove(self) -> None:
        shutil.rmtree(self._folder)


def _run(*command: str | Path, given: str | None = None, cwd: Path = ROOT, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ATTNSTORE_"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **variables},
        input=given,
        capture_output=True,
        text=True,
        timeout=_COMMAND_S_MAX,
        check=False,
    )
    if done.returncode:
        raise Broken(
            f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout[-2_000:]}{done.stderr[-4_000:]}"
        )
    return done.stdout


def build(folder: Path) -> Path:
    """Builds the checkout's wheel from its source distribution. Raises `Broken` where files are missing or do not belong."""
    source, built = folder / "source", folder / "dist"
    source.mkdir()
    built.mkdir()
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    builder = Environment(folder / "builder")
    builder.install("setuptools>=77")
    _run(builder.python, "-c", _BUILD.format(folder=str(built)), cwd=source)
    builder.remove()
    [archive] = built.glob("*.tar.gz")
    _check_archive(archive)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", built, archive, cwd=folder)
    [wheel] = built.glob("*.whl")
    _check_wheel(wheel)
    return wheel


def _check_archive(archive: Path) -> None:
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    missing = {str(path.relative_to(ROOT)) for path in _sources()} - names
    if missing:
        raise Broken(f"{archive.name} lacks {sorted(missing)}")


def _check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = set()
    for package, folder in SHIPPED.items():
        expected |= {f"{package}/{path.relative_to(folder)}" for path in _sources() if path.is_relative_to(folder)}
    if names != expected:
        raise Broken(f"{wheel.name} lacks {sorted(expected - names)} and holds in vain {sorted(names - expected)}")
    if not {f"{package}/py.typed" for package in SHIPPED} <= names:
        raise Broken(f"{wheel.name} does not say that it has types")


def _sources() -> list[Path]:
    """Every file of our packages but what Python leaves there."""
    found = (path for folder in SHIPPED.values() for path in folder.rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def try_extra(environment: Environment, wheel: Path, extra: str) -> Installed:
    """Installs the wheel with one extra and imports what it promises."""
    environment.install(f"attnstore{f'[{extra}]' if extra else ''} @ {wheel.as_uri()}")
    environment.add_experiments()
    size = environment.mib()
    names = sorted(promised(requirements(extra)))
    for _ in range(2):  # the first time compiles what is imported
        client_s, all_s = json.loads(environment.run("-c", _IMPORT, given=json.dumps(names)))
    if environment.program("attnstore", "--version") != f"attnstore {PROJECT['version']}\n":
        raise Broken("attnstore --version does not say the wheel's version")
    for needed, program in _COMMANDS.items():
        if requirements(needed) <= requirements(extra):
            environment.program(program, "--help")
    return Installed(extra, environment.packages(), size, len(names), client_s, all_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="try only these, beside the base and node; default: all")
    extras = parser.parse_args(argv).extras or list(EXTRAS)
    with tempfile.TemporaryDirectory(prog := "attnstore-wheels") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < _FREE_BYTES_MIN:
            print(f"{prog}: {folder} has less than {_FREE_BYTES_MIN >> 30} GiB free", file=sys.stderr)
            return 2
        try:
            _try_all(folder, extras)
        except (Broken, subprocess.TimeoutExpired) as error:
            print(f"{prog}: {error}", file=sys.stderr)
            return 1
    return 0


def _try_all(folder: Path, extras: Sequence[str]) -> None:
    wheel = build(folder)
    print(f"{wheel.name}: {wheel.stat().st_size / (1 << 20):.1f} MiB")
    print(f"{'':24}{'packages':>9}{'MiB':>9}{'modules':>9}{'client s':>10}{'all s':>8}", flush=True)
    client, node = Environment(folder / "client"), Environment(folder / "node")
    print(try_extra(client, wheel, BASE), flush=True)
    print(try_extra(node, wheel, "node"), flush=True)
    node.run("-c", _SERVE, str(client.python), "-c", _WRITE_AND_READ)
    client.remove()
    node.remove()
    for extra in extras:
        if extra != "node":
            environment = Environment(folder / extra)
            print(try_extra(environment, wheel, extra), flush=True)
            environment.remove()


if __name__ == "__main__":
    sys.exit(main())
