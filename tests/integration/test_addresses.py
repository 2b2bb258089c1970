"""Nodes on every kind of address: each service is reachable wherever the address says, over either family."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest

import attnstore
from attnstore import errors
from attnstore.address import Address
from attnstore.testing import RedisServer, StoreProcess
from attnstore.testing.ports import free_port
from tests.samples import SMALL, Batch, eventually

pytestmark = pytest.mark.ipv6

BatchOf = Callable[..., Batch]
IPV4, IPV6 = ("127.0.0.1", "localhost"), ("::1", "localhost")
BOTH = ("127.0.0.1", "::1", "localhost")


def sent_bytes(metrics: Address, transport: str) -> float:
    """Returns the bytes that the node reports as sent over a transport, because a client that cannot reach the page channel would
    use another one.
    """
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    series = f'attnstore_sent_bytes_total{{transport="{transport}"}} '
    return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attnstore.cli", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("listen", "hosts"), [("127.0.0.1", IPV4), ("[::1]", IPV6), ("localhost", BOTH), ("[::]", BOTH), ("0.0.0.0", BOTH)]
)
def test_every_service_of_a_node_is_reached_wherever_it_listens(listen: str, hosts: tuple[str, ...], batch_of: BatchOf) -> None:
    metrics_port = free_port("localhost")
    options = ("--capacity", "1MiB", "--insecure", "--metrics-port", str(metrics_port))
    with StoreProcess("--listen", f"{listen}:0", *options) as node:
        assert node.address.startswith(f"{listen}:")
        port = Address.parse(node.address).port
        for host in hosts:
            url = f"grpc://{Address.of(host, port)}"
            # urllib uses this machine's hosts file for localhost, which may name only one family.
            metrics = Address.of(hosts[0] if host == "localhost" else host, metrics_port)
            for transport in ("grpc", "tcp", "shm"):
                batch = batch_of(1, suffix=f"{host} {transport}")
                before = sent_bytes(metrics, transport)
                with attnstore.connect(url, transport=transport) as client:
                    client.register_layout(batch.namespace, SMALL)
                    assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts[0].is_kept
                    assert client.match(batch.namespace, [batch.hashes]).hits == (1,)
                    buffers = batch.buffers()
                    assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 1
                    assert buffers == batch.pages
                if transport != "shm":  # bytes that a reader copies itself are not sent
                    # The node counts bytes after sending them, when the reader may already have them.
                    expected = before + SMALL.page_bytes
                    assert eventually(lambda: sent_bytes(metrics, transport) == expected)  # noqa: B023 - called at once
            assert run("health", url).returncode == 0
            shown = run("status", "--directory", url)
            assert shown.returncode == 0
            assert "Unavailable" not in shown.stdout


@pytest.mark.redis
def test_a_cluster_lives_on_ipv6_alone(batch_of: BatchOf) -> None:
    with RedisServer(host="::1") as directory:
        assert directory.url.startswith("redis://[::1]:")
        member = ("--capacity", "1MiB", "--directory", directory.url)
        with (
            StoreProcess("--listen", "[::]:0", "--insecure", "--advertise", "::1", *member) as one,
            StoreProcess("--listen", "[::1]:0", *member) as two,
            attnstore.connect(directory.url) as client,
        ):
            addresses = {f"[::1]:{Address.parse(node.address).port}" for node in (one, two)}
            assert eventually(lambda: {each.node_id for each in client.members()} == addresses, 20)
            assert {each.url for each in client.members()} == {f"grpc://{address}" for address in addresses}
            batch = batch_of(3)
            client.register_layout(batch.namespace, SMALL)
            assert all(verdict.is_kept for verdict in client.write(batch.namespace, batch.hashes, batch.pages).verdicts)
            buffers = batch.buffers()
            assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 3
            shown = run("status", "--directory", directory.url)
            assert all(address in shown.stdout for address in addresses)
            assert "Unavailable" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("serve", "--listen", "::1:7400"), "--listen (command line): an IPv6 address needs brackets, as in [::1]:7400"),
        (("serve", "--advertise", "::1:7400"), "--advertise (command line): an IPv6 address needs brackets, as in [::1]:7400"),
        (("health", "grpc://::1:7400"), "'grpc://::1:7400'"),
        (("status", "--directory", "grpc://::1:7400"), "::1:7400"),
        (("serve", "--directory", "redis://::1:7400/0"), "directory's URL"),
    ],
)
def test_an_ipv6_address_without_brackets_is_refused_where_a_port_follows(arguments: tuple[str, ...], named: str) -> None:
    result = run(*arguments)
    assert "needs brackets" in result.stdout + result.stderr
    assert named in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for target in ("grpc://::1:7400", "grpc://::1:7400,[::1]:7401", "redis://::1:7400/0"):
        with pytest.raises(errors.InvalidArgument, match="needs brackets"):
            attnstore.connect(target)
