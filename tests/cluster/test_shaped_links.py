"""A node and its clients on different hosts, joined by a slow cable: real addresses and queues, no loopback."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from attnstore.testing import StoreProcess
from attnstore.testing.netns import ShapedLink, queueing_discipline

pytestmark = pytest.mark.netns

_CLIENT_S_MAX = 120

# Each client stores its own pages, waits at a barrier made of pages, then reads the pages of all clients.
_CLIENT = """
import sys, time
import attnstore
url, transport, own, clients = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
layout = attnstore.PageLayout(layers=30, kv_heads=3, head_dim=64)
namespace = attnstore.namespace(layout, model=b"shaped")
PAGES = 12

def pages(client):
    hashes = [(client * PAGES + page + 1).to_bytes(32, "little") for page in range(PAGES)]
    return hashes, [page_hash * (layout.page_bytes // 32) for page_hash in hashes]

with attnstore.connect(url, transport=transport, deadline_ms=60_000) as client:
    client.register_layout(namespace, layout)
    hashes, contents = pages(own)
    assert {verdict.name for verdict in client.write(namespace, hashes, contents).verdicts} == {"STORED"}
    for other in range(clients):
        hashes, contents = pages(other)
        while client.match(namespace, [hashes]).hits != (PAGES,):
            time.sleep(0.05)
        buffers = [bytearray(layout.page_bytes) for _ in hashes]
        assert client.read(namespace, hashes, buffers).leading_hits == PAGES
        assert buffers == contents
"""


@pytest.fixture(params=["1g", "10g"])
def link(request: pytest.FixtureRequest) -> Iterator[ShapedLink]:
    with ShapedLink(request.param) as link:
        yield link


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_every_client_reads_what_every_client_wrote_over_a_shaped_link(link: ShapedLink, transport: str, clients: int) -> None:
    with link.node.entered():
        node = StoreProcess("--listen", f"{link.node.address}:0", "--insecure", "--capacity", "64MiB")
    with node:
        with link.client.entered():
            running = [
                subprocess.Popen(
                    [sys.executable, "-c", _CLIENT, node.url, transport, str(own), str(clients)], stderr=subprocess.PIPE, text=True
                )
                for own in range(clients)
            ]
        try:
            failures = [process.communicate(timeout=_CLIENT_S_MAX)[1] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    assert [process.returncode for process in running] == [0] * clients, "\n".join(failures)


def test_a_host_is_reached_from_the_other_end_only(link: ShapedLink) -> None:
    with link.node.entered():
        node = StoreProcess("--listen", f"{link.node.address}:0", "--insecure", "--capacity", "64MiB")
    with node:
        with link.client.entered():
            inside = _describe(node.url, deadline_ms=30_000)
        # This process is on neither host, so it cannot reach the node's address.
        outside = _describe(node.url, deadline_ms=500)
    assert inside.returncode == 0, inside.stderr
    assert outside.returncode != 0


def test_nothing_is_left_of_a_link(link: ShapedLink) -> None:
    with ShapedLink("1g") as other:
        assert other.node.namespace in _namespaces()
    assert other.node.namespace not in _namespaces()
    assert link.node.namespace in _namespaces()


def test_a_cable_has_its_length_or_says_that_the_kernel_cannot_lengthen_it() -> None:
    before = _namespaces()
    try:
        with ShapedLink("100m/50m@40ms") as link:
            with link.node.entered():
                listener = socket.create_server((link.node.address, 0))
            began = time.monotonic()
            with listener, link.client.entered(), socket.create_connection(listener.getsockname(), _CLIENT_S_MAX):
                assert time.monotonic() - began >= 0.04
    except RuntimeError as error:
        assert "netem" in str(error)  # noqa: PT017 - which of the two holds depends on the kernel
    assert _namespaces() == before


def test_a_cable_without_rate_or_length_is_not_shaped() -> None:
    with ShapedLink("loopback") as link:
        shown = subprocess.run(["tc", "-netns", link.node.namespace, "qdisc"], capture_output=True, text=True, check=True)
    assert "tbf" not in shown.stdout
    assert "netem" not in shown.stdout


def test_each_direction_is_shaped_by_its_own_rate() -> None:
    with ShapedLink("200m/100m") as link:
        for host, rate in ((link.node, "200Mbit"), (link.client, "100Mbit")):
            shown = subprocess.run(["tc", "-netns", host.namespace, "qdisc"], capture_output=True, text=True, check=True)
            assert f"rate {rate}" in shown.stdout


@pytest.mark.parametrize(
    ("bits_per_s", "delay_ms", "discipline"),
    [
        (math.inf, 0.0, ""),
        (1e9, 0.1, "tbf rate 1000000000bit burst 262144 latency 20ms"),
        (10e9, 0.0, "tbf rate 10000000000bit burst 1250000 latency 20ms"),
        (100e6, 4.0, "netem delay 4.0ms 0.5ms rate 100000000bit limit 1000"),
        (10e9, 50.0, "netem delay 50.0ms 0.5ms rate 10000000000bit limit 9723"),
        (math.inf, 1.0, "netem delay 1.0ms 0.5ms limit 29167"),
    ],
)
def test_a_rate_is_a_token_bucket_and_a_delay_is_netem(bits_per_s: float, delay_ms: float, discipline: str) -> None:
    assert " ".join(queueing_discipline(bits_per_s, delay_ms, 0.5)) == discipline


def _describe(url: str, deadline_ms: int) -> subprocess.CompletedProcess[str]:
    probe = f"import attnstore; attnstore.connect({url!r}, deadline_ms={deadline_ms}).describe()"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=_CLIENT_S_MAX, check=False)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines()]
