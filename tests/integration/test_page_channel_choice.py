"""Which transport a client uses: a blocked port, a transport that is asked for, and whose channel it is."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import BulkUnavailable
from attnstore.client.blocking import Client
from attnstore.client.transports.tcp import TcpTransport
from attnstore.testing import StoreProcess
from attnstore.testing.clock import ManualClock
from attnstore.testing.ports import free_port
from tests.channels import open_channel
from tests.samples import SMALL, eventually, make_batch, read_back, stored
from tests.transports import connection_to, offer

INCOMPLETE, STORED = PageStatus.INCOMPLETE, PageStatus.STORED
RETRY_MS = 30_000


class Door:
    """A tcp transport whose port is open or blocked as the test says; counts connections."""

    def __init__(self, node: StoreProcess, channels: int = 1) -> None:
        self._node = node
        self.blocked = True
        self.knocks = 0
        self._nobody = f"127.0.0.1:{free_port()}"
        self.transport = TcpTransport("127.0.0.1", self._open, channels)

    def _open(self, _name: str, _deadline: object) -> tuple[str, bytes]:
        self.knocks += 1
        port, token = open_channel(self._node.address)
        return (self._nobody, token) if self.blocked else (f":{port}", token)


def test_a_blocked_port_falls_back_to_grpc_with_a_warning_and_comes_back(
    shared_node: StoreProcess, caplog: pytest.LogCaptureFixture
) -> None:
    clock, door = ManualClock(), Door(shared_node)
    connection = connection_to(shared_node.url, clock=clock)
    client = Client(connection)
    offer(connection, door.transport)
    batch = stored(client, 3, "blocked")
    assert "using the next one" in caplog.text
    assert read_back(client, batch).leading_hits == 3
    assert door.knocks == 1, "a blocked port is left alone for a while"
    door.blocked = False
    assert read_back(client, batch).leading_hits == 3
    assert door.knocks == 1
    clock.advance_ms(RETRY_MS)
    assert read_back(client, batch).leading_hits == 3
    assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {PageStatus.ALREADY_PRESENT}
    assert door.knocks == 2
    client.close()
    door.transport.close()


async def test_a_blocked_port_falls_back_for_an_asynchronous_client_too(shared_node: StoreProcess) -> None:
    door = Door(shared_node)
    batch = make_batch(2, model="blocked asynchronous")
    connection = connection_to(shared_node.url)
    connection.choice.offer([door.transport, connection.grpc])
    async with AsyncClient(connection) as client:
        await client.register_layout(batch.namespace, SMALL)
        assert set((await client.write(batch.namespace, batch.hashes, batch.pages)).verdicts) == {STORED}
        buffers = batch.buffers()
        assert (await client.read(batch.namespace, batch.hashes, buffers)).leading_hits == 2
        assert buffers == batch.pages
    assert door.knocks == 1
    door.transport.close()


def test_a_forced_transport_is_not_replaced(shared_node: StoreProcess) -> None:
    door = Door(shared_node)
    batch = make_batch(2, model="forced")
    connection = connection_to(shared_node.url, "tcp")
    with Client(connection) as client:
        offer(connection, door.transport)
        client.register_layout(batch.namespace, SMALL)
        with pytest.raises(BulkUnavailable):
            client.write(batch.namespace, batch.hashes, batch.pages)
        result = client.read(batch.namespace, batch.hashes, batch.buffers())
        assert isinstance(result.error, BulkUnavailable)
        assert set(result.statuses) == {INCOMPLETE}
    door.transport.close()


def test_a_forced_transport_that_the_node_does_not_offer_is_an_error_of_the_call() -> None:
    batch = make_batch(1, model="not offered")
    with StoreProcess("--capacity", "16MiB", "--transports", "none") as node:
        with attnstore.connect(node.url, transport="tcp") as client:
            client.register_layout(batch.namespace, SMALL)
            for call in (
                lambda: client.read(batch.namespace, batch.hashes, batch.buffers()),
                lambda: client.write(batch.namespace, batch.hashes, batch.pages),
            ):
                with pytest.raises(errors.InvalidArgument):
                    call()
        with attnstore.connect(node.url) as client:
            assert read_back(client, stored(client, 1, "over grpc")).leading_hits == 1


def test_each_transport_counts_its_own_bytes() -> None:
    metrics = f"127.0.0.1:{free_port()}"
    with StoreProcess("--capacity", "16MiB", "--metrics-port", metrics.rpartition(":")[2]) as node:
        for transport, pages in (("grpc", 3), ("tcp", 5)):
            with attnstore.connect(node.url, transport=transport) as client:
                batch = stored(client, pages, f"counted over {transport}")
                assert read_back(client, batch).leading_hits == pages
                assert read_back(client, batch).leading_hits == pages

        def exposed() -> set[str]:
            with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=20) as answer:
                return set(answer.read().decode().splitlines())

        expected = {
            f'attnstore_{way}_bytes_total{{transport="{transport}"}} {times * pages * SMALL.page_bytes:.1f}'
            for transport, pages in (("grpc", 3), ("tcp", 5))
            for way, times in (("sent", 2), ("received", 1))
        }
        # A client has its last byte before the node has counted it.
        assert eventually(lambda: expected <= exposed()), expected - exposed()
        with attnstore.connect(node.url) as client:
            now = client.stats()
    assert (now.read_bytes, now.written_bytes) == (16 * SMALL.page_bytes, 8 * SMALL.page_bytes)


def test_a_page_channel_belongs_to_the_tenant_that_asked_for_it(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('owner = "owners"\nstranger = "strangers"\n')
    with StoreProcess("--capacity", "16MiB", "--tokens-file", str(tokens)) as node:
        with attnstore.connect(node.url, transport="tcp", token="owners") as owner:
            batch = stored(owner, 2, "owned")
            with attnstore.connect(node.url, transport="tcp", token="strangers") as stranger:
                stranger.register_layout(batch.namespace, SMALL)
                assert read_back(stranger, batch).leading_hits == 0
                own = stored(stranger, 1, "the stranger's own")
                assert read_back(stranger, own).leading_hits == 1
            assert read_back(owner, batch).leading_hits == 2
        with attnstore.connect(node.url, transport="tcp") as nobody, pytest.raises(errors.Unauthenticated):
            nobody.describe()
