"""Networks of several machines in one: network namespaces joined by a cable of a given rate, or by a switch.

Owns: the namespaces, their virtual Ethernet pairs and token bucket filters. Invariant: all of it is gone when the `with` block
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
_BRIDGE = "bridge"
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
                _add_namespace(stack, host.namespace)
            peer = ("peer", "name", _DEVICE, "netns", self.client.namespace)
            _run("ip", "link", "add", _DEVICE, "mtu", str(_MTU_BYTES), "netns", self.node.namespace, "type", "veth", *peer)
            for host in (self.node, self.client):
                self._configure(host)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._undo.close()

    def _configure(self, host: Host) -> None:
        _bring_up(host)
        _shape(host.namespace, _DEVICE, self._bits_per_s)


class Switch:
    """Hosts on one switch, each on a cable of its own; a context manager.

    `join` adds a host while the switch runs. Raises `RuntimeError` with the words of `ip` or `tc` where the system refuses.
    """

    def __init__(self) -> None:
        self._name = f"attnstore-{os.getpid()}-{next(_NAMES)}"
        self._ports: dict[str, str] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            _add_namespace(stack, self._name)
            _run("ip", "-netns", self._name, "link", "add", _BRIDGE, "mtu", str(_MTU_BYTES), "type", "bridge")
            _run("ip", "-netns", self._name, "link", "set", _BRIDGE, "up")
            self._undo = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._undo.close()

    def join(self, name: str) -> Host:
        """A host of this name, with an address of the switch's network."""
        number = len(self._ports) + 1
        host = Host(f"{self._name}-{name}", f"10.98.77.{number}")
        port = self._ports[host.namespace] = f"port{number}"
        _add_namespace(self._undo, host.namespace)
        peer = ("peer", "name", _DEVICE, "netns", host.namespace)
        _run("ip", "link", "add", port, "mtu", str(_MTU_BYTES), "netns", self._name, "type", "veth", *peer)
        _bring_up(host)
        _run("ip", "-netns", self._name, "link", "set", port, "master", _BRIDGE, "up")
        return host

    def cut(self, host: Host) -> None:
        """From now on nothing passes between `host` and the others, and neither end is told: packets vanish."""
        _run("ip", "-netns", self._name, "link", "set", self._ports[host.namespace], "nomaster")

    def mend(self, host: Host) -> None:
        """Ends a cut."""
        _run("ip", "-netns", self._name, "link", "set", self._ports[host.namespace], "master", _BRIDGE)

    def shape(self, host: Host, bits_per_s: int) -> None:
        """Gives the host's cable a rate in each direction."""
        _shape(host.namespace, _DEVICE, bits_per_s)
        _shape(self._name, self._ports[host.namespace], bits_per_s)


def _add_namespace(undo: ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    undo.callback(_run, "ip", "netns", "delete", name)


def _bring_up(host: Host) -> None:
    inside = ("-netns", host.namespace)
    _run("ip", *inside, "address", "add", f"{host.address}/24", "dev", _DEVICE)
    _run("ip", *inside, "link", "set", "lo", "up")
    _run("ip", *inside, "link", "set", _DEVICE, "mtu", str(_MTU_BYTES), "up")


def _shape(namespace: str, device: str, bits_per_s: int) -> None:
    burst_bytes = max(_BURST_BYTES_MIN, int(bits_per_s / 8 * _BURST_S))
    bucket = ("rate", f"{bits_per_s}bit", "burst", str(burst_bytes), "latency", f"{_QUEUE_MS}ms")
    _run("tc", "-netns", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
