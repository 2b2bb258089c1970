"""Hosts on a switch: which hosts reach each other, the effect of a cut, and the rate of a shaped cable."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from attnstore.testing.netns import Host, Switch

pytestmark = pytest.mark.netns

_TIMEOUT_S = 0.5


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch() as switch:
        yield switch


def can_connect(source: Host, listening: socket.socket) -> bool:
    with source.entered():
        connection = socket.socket()
    with connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(listening.getsockname())
        except TimeoutError:
            return False
        return True


def listen(host: Host) -> socket.socket:
    with host.entered():
        return socket.create_server((host.address, 0))


def test_a_cut_host_reaches_nobody_until_it_is_mended(switch: Switch) -> None:
    left, middle, right = (switch.join(name) for name in ("left", "middle", "right"))
    with listen(right) as server:
        assert can_connect(left, server)
        switch.cut(right)
        assert not can_connect(left, server)
        switch.mend(right)
        assert can_connect(left, server)
        switch.cut(left)
        assert not can_connect(left, server)
        assert can_connect(middle, server)


def test_a_shaped_cable_has_its_rate_at_both_ends(switch: Switch) -> None:
    host = switch.join("host")
    switch.shape(host, "1g")
    switch.shape(host, "2g")
    hosts = {name for name in _namespaces() if host.namespace.startswith(name)}
    shown = [
        subprocess.run(["tc", "-netns", name, "qdisc", "show"], capture_output=True, text=True, check=True).stdout for name in hosts
    ]
    assert len(shown) == 2
    assert all("tbf" in qdiscs and "rate 2Gbit" in qdiscs for qdiscs in shown)


def test_nothing_is_left_of_a_switch() -> None:
    with Switch() as switch:
        host = switch.join("host")
        assert host.namespace in _namespaces()
    assert host.namespace not in _namespaces()


def _namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}
