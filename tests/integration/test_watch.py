"""Watching a namespace: every event once and in order, or the number of lost events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import islice

import pytest

import attnstore
import attnstore.aio
from attnstore import PageEvent, PageEventKind, errors
from attnstore.config import ServeOptions
from attnstore.server import events
from attnstore.server.node import StoreNode
from attnstore.testing import StoreProcess
from tests.samples import SMALL, Batch, eventually

BatchOf = Callable[..., Batch]
SEALED, EVICTED, DELETED, LAGGED = PageEventKind.SEALED, PageEventKind.EVICTED, PageEventKind.DELETED, PageEventKind.LAGGED


@pytest.fixture
def full_node() -> Iterator[StoreProcess]:
    """Room for four small pages."""
    with StoreProcess("--capacity", str(4 * SMALL.page_bytes)) as node:
        yield node


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_a_watcher_sees_what_becomes_of_pages_in_order(full_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(6)
    with attnstore.connect(full_node.url, transport=transport) as client:
        client.register_layout(batch.namespace, SMALL)
        watch = client.watch(batch.namespace, deadline_ms=20_000)
        client.write(batch.namespace, batch.hashes, batch.pages)
        client.write(batch.namespace, batch.hashes[5:], batch.pages[5:])
        client.delete(batch.namespace, batch.hashes[3:4])
        seen = list(islice(watch, 9))
    hashes = batch.hashes
    expected = [(SEALED, page_hash) for page_hash in hashes[:4]]
    expected += [(EVICTED, hashes[0]), (SEALED, hashes[4]), (EVICTED, hashes[1]), (SEALED, hashes[5]), (DELETED, hashes[3])]
    assert [(event.kind, event.hash) for event in seen] == expected
    assert [event.sequence for event in seen] == list(range(1, 10))


def test_namespaces_are_watched_apart(shared_node: StoreProcess, batch_of: BatchOf) -> None:
    mine, other = batch_of(2), batch_of(3, suffix="other")
    with attnstore.connect(shared_node.url) as client:
        for batch in (mine, other):
            client.register_layout(batch.namespace, SMALL)
        watch = client.watch(mine.namespace, deadline_ms=20_000)
        for batch in (other, mine):
            client.write(batch.namespace, batch.hashes, batch.pages)
        assert [event.hash for event in islice(watch, 2)] == mine.hashes


def test_a_closed_watch_ends_its_stream_on_the_node(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    with attnstore.connect(node.url) as client:
        client.register_layout(batch.namespace, SMALL)
        watches = [client.watch(batch.namespace) for _ in range(3)]
        assert client.describe().in_flight == 3
        client.write(batch.namespace, batch.hashes, batch.pages)
        for watch in watches:
            assert next(watch).kind is SEALED
        watches.pop().close()
        assert eventually(lambda: client.describe().in_flight == 2)
        watches.clear()
        assert eventually(lambda: client.describe().in_flight == 0)


async def test_an_asynchronous_watch_ends_with_its_generator_or_its_client(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(2)
    async with attnstore.aio.connect(node.url) as client:
        await client.register_layout(batch.namespace, SMALL)
        async with aclosing(await client.watch(batch.namespace)) as watch:
            await client.write(batch.namespace, batch.hashes, batch.pages)
            async for event in watch:
                assert event == PageEvent(SEALED, batch.hashes[0], 1)
                break
        watch = await client.watch(batch.namespace)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(errors.ClientClosed):
            await asyncio.wait_for(waiting, 5)


async def test_a_slow_watcher_is_told_how_much_it_missed(monkeypatch: pytest.MonkeyPatch, batch_of: BatchOf) -> None:
    monkeypatch.setattr(events, "WATCH_EVENTS_MAX", 4)
    batch = batch_of(12)
    node = StoreNode(
        ServeOptions(listen="127.0.0.1:0", capacity=1 << 20, attend_threads=0), lambda url, _token: attnstore.aio.connect(url)
    )  # type: ignore[arg-type]
    await node.start()
    try:
        async with attnstore.aio.connect(f"grpc://{node.address}", transport="grpc") as client:
            await client.register_layout(batch.namespace, SMALL)
            await client.write(batch.namespace, batch.hashes, batch.pages)
            watch = await client.watch(batch.namespace, deadline_ms=20_000)
            # Twelve events at once, while the watcher's queue holds four.
            await client.delete(batch.namespace, batch.hashes)
            seen = [await anext(watch) for _ in range(5)]
            assert [event.hash for event in seen[:4]] == batch.hashes[:4]
            assert (seen[4].kind, seen[4].hash, seen[4].dropped) == (LAGGED, b"", 8)
            await client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
            assert await anext(watch) == PageEvent(SEALED, batch.hashes[0], 25)
    finally:
        await node.stop()
