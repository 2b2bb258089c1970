"""Importing our packages changes nothing in another program's process, such as vLLM's."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnstore
import attnstore_worker

_SETTINGS = """
import faulthandler, gc, importlib, json, locale, logging, multiprocessing, os, resource, signal, socket, sys, threading, warnings
import torch

def settings():
    return {
        **{f"environment {name}": value for name, value in os.environ.items()},
        "directory": os.getcwd(),
        "signals": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "faulthandler": faulthandler.is_enabled(),
        "hooks": list(map(repr, (sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning))),
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": [list(map(repr, logging.root.handlers)), logging.root.level, logging.root.manager.disable,
                    repr(logging.getLoggerClass()), repr(logging.getLogRecordFactory()), repr(logging.lastResort)],
        "collector": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.get_debug()],
        "processes": multiprocessing.get_start_method(allow_none=True),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "switch interval": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "limits": [resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_CORE)],
        "timeout": socket.getdefaulttimeout(),
        "locale": locale.setlocale(locale.LC_ALL),
        "path": sys.path,
        "torch": [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.initial_seed()],
    }
"""
_TRY = """
for name in {host}:
    importlib.import_module(name)
before = settings()
for name in {ours}:
    importlib.import_module(name)
after = settings()
keys = before.keys() | after.keys()
print(json.dumps({{key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}}))
"""


_NEED_VLLM = {"attnstore_worker.vllm.connector", "attnstore_worker.vllm.messages", "attnstore_worker.vllm.reporting"}


def changed_by(ours: list[str], host: list[str]) -> Any:
    """Returns the settings of a process before and after importing `ours`, where they differ; it has imported `host` first."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    script = _SETTINGS + _TRY.format(ours=ours, host=host)
    return json.loads(subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True).stdout)


def modules_of(package: Any) -> list[str]:
    """Returns all modules that can be imported here: two of the connector need vLLM."""
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [package.__name__, *(name for name in names if name not in _NEED_VLLM)]


def modules_of_the_connector() -> list[str]:
    return [name for name in modules_of(attnstore_worker) if f"{name}.".startswith("attnstore_worker.vllm.")]


def test_importing_the_connectors_package_changes_nothing_of_vllms_process() -> None:
    assert changed_by(["attnstore_worker.vllm"], host=[]) == {}


def test_importing_the_connector_changes_nothing_of_vllms_process() -> None:
    ours = modules_of_the_connector()
    assert len(ours) > 5
    assert changed_by(ours, host=[]) == {}


@pytest.mark.parametrize("package", [attnstore, attnstore_worker], ids=lambda package: package.__name__)
def test_importing_any_module_changes_nothing_of_the_process(package: Any) -> None:
    # torch's compiler sets the path of its cache in the environment; transformers loads that compiler and filters warnings.
    assert changed_by(modules_of(package), host=["torch._dynamo", "transformers.modeling_utils", "transformers.generation"]) == {}


@pytest.fixture(params=["worker.py", "worker/__init__.py"])
def beside_a_users_worker(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder in which a user starts vLLM, with a module `worker` of his own that must be imported by nobody else."""
    module = tmp_path / request.param
    module.parent.mkdir(exist_ok=True)
    module.write_text("raise RuntimeError('the module of a user was imported')\n")
    return tmp_path


def test_the_connector_is_imported_beside_a_users_module_named_worker(beside_a_users_worker: Path) -> None:
    script = "import importlib, sys; list(map(importlib.import_module, sys.argv[1:])); assert 'worker' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, *modules_of_the_connector()], cwd=beside_a_users_worker, check=True)
    found = subprocess.run([sys.executable, "-c", "import worker"], cwd=beside_a_users_worker, check=False, capture_output=True)
    assert b"the module of a user" in found.stderr, "the current directory is first on the path"


def test_the_command_runs_beside_a_users_module_named_worker(beside_a_users_worker: Path) -> None:
    command = [sys.executable, "-m", "attnstore_worker", "--help"]
    assert subprocess.run(command, cwd=beside_a_users_worker, check=True, capture_output=True).stdout.startswith(b"usage")


def test_our_own_worker_has_its_threads_spin_briefly() -> None:
    script = "import sys; from attnstore_worker.cli import main; sys.exit(main(['no-such-command']))"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [sys.executable, "-c", f"import atexit, os\natexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT')))\n{script}"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.split()) == (2, [b"10000"])


HEAVY = ("torch", "numpy", "transformers", "numba", "pydantic")


@pytest.mark.parametrize(
    ("module", "arguments", "status"),
    [
        ("attnstore.cli", ["--help"], 0),
        ("attnstore_worker.cli", ["--help"], 0),
        ("attnstore_worker.cli", ["serve", "--help"], 0),
        ("attnstore_worker.cli", ["generate", "--prompt-file", "/dev/null", "--pool", "none"], 2),
        ("attnstore_worker.cli", ["generate", "--prompt-file", "/dev/null", "--attend", "always"], 2),
        ("attnstore_worker.cli", ["explain", "--prompt-file", "/dev/null"], 2),
    ],
)
def test_help_and_refusals_wait_for_no_large_library(module: str, arguments: list[str], status: int) -> None:
    script = f"""
import sys
from {module} import main
status = main({arguments!r})
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "imported:")
