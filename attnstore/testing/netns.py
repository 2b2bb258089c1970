"""A network of two machines in one: network namespaces joined by a cable of a given rate.

Owns: the namespaces, their virtual Ethernet pair and its token bucket filters. Invariant: all of it is gone when the `with` block
ends, however it ends. Linux only; needs root and iproute2 (`ip`, `tc`).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_NAMES = itertools.count()
_DEVICE = "eth0"
_MTU_BYTES = 9_000
"""Jumbo frames, as storage networks have: headers cost 0.7% of the rate instead of 4.4%."""
_BURST_BYTES_MIN = 256 << 10
_BURST_S = 0.001
_QUEUE_MS = 20


@dataclass(frozen=True, slots=True)
class Host:
    """One end of the cable: a network namespace and its address."""

    namespace: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and every process that it starts, is on this host. Threads that exist already are not."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(Path("/run/netns") / self.namespace, os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(own)


class ShapedLink:
    """Two hosts and a cable of `bits_per_s` in each direction; a context manager.

    `node` and `client` are its ends. Raises `RuntimeError` with the words of `ip` or `tc` where the system refuses.
    """

    def __init__(self, bits_per_s: int) -> None:
        name = f"attnstore-{os.getpid()}-{next(_NAMES)}"
        self.node = Host(f"{name}-node", "10.98.76.1")
        self.client = Host(f"{name}-client", "10.98.76.2")
        self._bits_per_s = bits_per_s
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for host in (self.node, self.client):
                _run("ip", "netns", "add", host.namespace)
                stack.callback(_run, "ip", "netns", "delete", host.namespace)
            peer = ("peer", "name", _DEVICE, "netns", self.client.namespace)
            _run("ip", "link", "add", _DEVICE, "mtu", str(_MTU_BYTES), "netns", self.node.namespace, "type", "veth", *peer)
            for host in (self.node, self.client):
                self._configure(host)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._undo.close()

    def _configure(self, host: Host) -> None:
        inside = ("-netns", host.namespace)
        burst_bytes = max(_BURST_BYTES_MIN, int(self._bits_per_s / 8 * _BURST_S))
        bucket = ("rate", f"{self._bits_per_s}bit", "burst", str(burst_bytes), "latency", f"{_QUEUE_MS}ms")
        _run("ip", *inside, "address", "add", f"{host.address}/24", "dev", _DEVICE)
        _run("ip", *inside, "link", "set", "lo", "up")
        _run("ip", *inside, "link", "set", _DEVICE, "mtu", str(_MTU_BYTES), "up")
        _run("tc", *inside, "qdisc", "add", "dev", _DEVICE, "root", "tbf", *bucket)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
