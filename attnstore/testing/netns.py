"""Networks of several hosts on one machine: network namespaces joined by a cable with a link profile, or by a switch.

Owns: the namespaces, their virtual Ethernet pairs and queueing disciplines. Invariant: all of them are removed when the `with`
block ends, however it ends. Linux only; needs root and iproute2 (`ip`, `tc`). A rate needs the kernel's `tbf`; a delay needs
`netem`, which not every kernel has: without it, `attnstore.testing.link` delays in userspace.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from attnstore.links import LinkProfile, parse_link

_NAMES = itertools.count()
_DEVICE = "eth0"
_BRIDGE = "bridge"
_MTU_BYTES = 9_000
"""Jumbo frames, as in storage networks: headers cost 0.7% of the rate instead of 4.4%."""
_BURST_BYTES_MIN = 256 << 10
_BURST_S = 0.001
_QUEUE_MS = 20
_QUEUE_PACKETS_MIN = 1_000
_OWN_DELAY_MS = 0.1
"""About the time of a wake-up between two namespaces: a cable with no longer delay needs no `netem`."""


@dataclass(frozen=True, slots=True)
class Host:
    """One end of the cable: a network namespace and its address."""

    namespace: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Moves this thread, and every process that it starts, to this host for the block. Existing threads stay."""
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
    """Two hosts and a cable with a profile (or its text, see `parse_link`) between them; a context manager.

    `node` and `client` are its ends; `down` is from the node. Raises `RuntimeError` with the message of `ip` or `tc` if the system
    refuses, for example a delay without `netem`.
    """

    def __init__(self, profile: LinkProfile | str) -> None:
        name = f"attnstore-{os.getpid()}-{next(_NAMES)}"
        self.node = Host(f"{name}-node", "10.98.76.1")
        self.client = Host(f"{name}-client", "10.98.76.2")
        self._profile = parse_link(profile) if isinstance(profile, str) else profile
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for host in (self.node, self.client):
                _add_namespace(stack, host.namespace)
            peer = ("peer", "name", _DEVICE, "netns", self.client.namespace)
            _run("ip", "link", "add", _DEVICE, "mtu", str(_MTU_BYTES), "netns", self.node.namespace, "type", "veth", *peer)
            for host, bits_per_s in ((self.node, self._profile.down_bits_per_s), (self.client, self._profile.up_bits_per_s)):
                _bring_up(host)
                _shape(host.namespace, _DEVICE, bits_per_s, self._profile)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._undo.close()


class Switch:
    """Hosts on one switch, each on a cable of its own; a context manager.

    `join` adds a host while the switch runs. Raises `RuntimeError` with the message of `ip` or `tc` if the system refuses.
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
        """Adds a host of this name, with an address in the switch's network."""
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
        """Drops all packets between `host` and the others, without a sign to either end."""
        _run("ip", "-netns", self._name, "link", "set", self._ports[host.namespace], "nomaster")

    def mend(self, host: Host) -> None:
        """Ends a cut."""
        _run("ip", "-netns", self._name, "link", "set", self._ports[host.namespace], "master", _BRIDGE)

    def shape(self, host: Host, profile: LinkProfile | str) -> None:
        """Gives the host's cable a profile; `up` is from the host."""
        profile = parse_link(profile) if isinstance(profile, str) else profile
        _shape(host.namespace, _DEVICE, profile.up_bits_per_s, profile)
        _shape(self._name, self._ports[host.namespace], profile.down_bits_per_s, profile)


def queueing_discipline(bits_per_s: float, delay_ms: float, jitter_ms: float) -> tuple[str, ...]:
    """Returns the arguments of `tc` for one end of a cable: a token bucket for a rate, `netem` if there is also a delay, or
    nothing.

    >>> queueing_discipline(1e9, 0.0, 0.0)
    ('tbf', 'rate', '1000000000bit', 'burst', '262144', 'latency', '20ms')
    """
    rate = () if bits_per_s == math.inf else ("rate", f"{bits_per_s:.0f}bit")
    if delay_ms > _OWN_DELAY_MS:
        # Room for bytes in flight and for the queue before them; a cable without a limit is as fast as memory.
        packets = math.ceil(min(bits_per_s, 100e9) / 8 * (delay_ms + _QUEUE_MS) / 1000 / _MTU_BYTES)
        return ("netem", "delay", f"{delay_ms}ms", f"{jitter_ms}ms", *rate, "limit", str(max(_QUEUE_PACKETS_MIN, packets)))
    if not rate:
        return ()
    burst_bytes = max(_BURST_BYTES_MIN, int(bits_per_s / 8 * _BURST_S))
    return ("tbf", *rate, "burst", str(burst_bytes), "latency", f"{_QUEUE_MS}ms")


def _add_namespace(undo: ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    undo.callback(_run, "ip", "netns", "delete", name)


def _bring_up(host: Host) -> None:
    inside = ("-netns", host.namespace)
    _run("ip", *inside, "address", "add", f"{host.address}/24", "dev", _DEVICE)
    _run("ip", *inside, "link", "set", "lo", "up")
    _run("ip", *inside, "link", "set", _DEVICE, "mtu", str(_MTU_BYTES), "up")


def _shape(namespace: str, device: str, bits_per_s: float, profile: LinkProfile) -> None:
    discipline = queueing_discipline(bits_per_s, profile.one_way_ms, profile.jitter_ms) or ("pfifo_fast",)
    _run("tc", "-netns", namespace, "qdisc", "replace", "dev", device, "root", *discipline)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
