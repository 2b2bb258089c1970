"""Late bytes are never written: when a call has returned, however it ended, its buffers belong to the caller again.

In each test a node sends half of a page and holds the rest back until the caller has its buffer again and has written its own data
there. Then the node sends until its connection breaks, because only a closed connection takes no more bytes.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import attnstore
from attnstore import PageStatus, errors
from attnstore.client.async_client import AsyncClient
from attnstore.client.blocking import Client
from attnstore.client.calls import Transfer
from attnstore.client.transports.tcp import TcpTransport
from attnstore.core.hashing import layer_checksums, page_checksum
from attnstore.limits import HASH_BYTES
from attnstore.testing import StoreProcess
from attnstore.wire.page_channel import encode_slice
from tests.channels import NodeEnd, ScriptedNode, read_plan, scripted
from tests.samples import LARGE, Batch, make_batch
from tests.transports import connection_to, offer

SENTINEL = b"\x5a"
HALF = LARGE.page_bytes // 2
DEADLINE_MS = 300


class LateNode:
    """A script: sends half of the first requested page on each connection, and bytes without end after `caller_is_back`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.half_sent = threading.Semaphore(0)
        self.caller_is_back = threading.Event()
        self.sent_until_broken = threading.Semaphore(0)

    def __call__(self, end: NodeEnd) -> None:
        frame, joined = end.next_request()
        page = self.batch.pages[self.batch.hashes.index(joined[:HASH_BYTES])]  # type: ignore[arg-type]
        end.stream.send(encode_slice(frame.request, 0, len(page), 0, page_checksum(page)), page[:HALF])
        self.half_sent.release()
        assert self.caller_is_back.wait(20)
        end.send_until_broken()
        self.sent_until_broken.release()


def reuse(node: LateNode, buffers: list[bytearray], connections: int = 1) -> None:
    """Reuses the buffers for other data, then lets the rest arrive late."""
    for buffer in buffers:
        buffer[:] = SENTINEL * len(buffer)
    node.caller_is_back.set()
    for _ in range(connections):
        assert node.sent_until_broken.acquire(timeout=20)
    assert all(buffer == SENTINEL * len(buffer) for buffer in buffers)


@pytest.fixture
def store() -> Iterator[StoreProcess]:
    """A real node for the calls over gRPC; its bulk transport is replaced."""
    with StoreProcess("--capacity", "16MiB", "--transports", "none") as node:
        yield node


@pytest.mark.parametrize("channels", [1, 3])
def test_after_a_deadline(channels: int) -> None:
    node = LateNode(make_batch(3, model="late deadline", layout=LARGE))
    buffers = node.batch.buffers()
    with scripted(node, channels=channels) as transport:
        with pytest.raises(errors.DeadlineExceeded):
            transport.read(read_plan(node.batch, buffers, deadline_ms=DEADLINE_MS)).wait()
        reuse(node, buffers, connections=channels)


def test_after_a_deadline_of_a_read_by_layers() -> None:
    batch = make_batch(2, model="late layers", layout=LARGE)
    node = LateNode(batch)
    row = b"".join(page[: LARGE.layer_bytes] for page in batch.pages)

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        sealed = layer_checksums(row, LARGE.layer_bytes)
        end.stream.send(encode_slice(frame.request, 0, len(sealed) + len(row), 0, 0), sealed, row[: LARGE.layer_bytes + 10])
        node.caller_is_back.wait(20)
        end.send_until_broken()
        node.sent_until_broken.release()

    buffers = batch.buffers()
    with scripted(serve) as transport:
        with pytest.raises(errors.DeadlineExceeded):
            transport.read(read_plan(batch, buffers, deadline_ms=DEADLINE_MS, on_layer=lambda _layer, _pages: None)).wait()
        reuse(node, buffers)


def test_after_one_part_failed_while_another_was_still_receiving() -> None:
    """The call must not return before the slower part has ended too."""
    batch = make_batch(2, model="late part", layout=LARGE)
    failed = threading.Event()
    node = LateNode(batch)

    def serve(end: NodeEnd) -> None:
        frame, joined = end.next_request()
        if joined[:HASH_BYTES] == batch.hashes[0]:
            assert node.half_sent.acquire(timeout=20)
            end.stream.send(b"this is no frame".ljust(128))
            failed.set()
            return
        page = batch.pages[1]
        end.stream.send(encode_slice(frame.request, 0, len(page), 0, page_checksum(page)), page[:HALF])
        node.half_sent.release()
        assert failed.wait(20)
        # If the call returned at the first failure, its buffer would be written to now.
        node.caller_is_back.wait(0.2)
        end.stream.send(page[HALF:])
        end.send_until_broken()
        node.sent_until_broken.release()

    buffers = batch.buffers()
    with scripted(serve, channels=2) as transport:
        with pytest.raises(errors.ProtocolError):
            transport.read(read_plan(batch, buffers)).wait()
        assert not node.caller_is_back.is_set()
        for buffer in buffers:
            buffer[:] = SENTINEL * len(buffer)
        node.caller_is_back.set()
        transport.close()  # the successful part returned its connection to the pool
        assert node.sent_until_broken.acquire(timeout=20)
        assert all(buffer == SENTINEL * len(buffer) for buffer in buffers)


@pytest.mark.parametrize("channels", [1, 2])
def test_after_an_interrupt(channels: int) -> None:
    node = LateNode(make_batch(2, model="late interrupt", layout=LARGE))
    buffers = node.batch.buffers()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        for _ in range(channels):
            assert node.half_sent.acquire(timeout=20)
        signal.pthread_kill(main_thread, signal.SIGINT)

    with scripted(node, channels=channels) as transport, ThreadPoolExecutor(1) as thread:
        interrupting = thread.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            transport.read(read_plan(node.batch, buffers)).wait()
        interrupting.result()
        reuse(node, buffers, connections=channels)


@pytest.mark.parametrize("channels", [1, 2])
def test_after_an_abort_from_another_thread(channels: int) -> None:
    node = LateNode(make_batch(2, model="late abort", layout=LARGE))
    buffers = node.batch.buffers()
    transfer = Transfer()

    def abort() -> None:
        for _ in range(channels):
            assert node.half_sent.acquire(timeout=20)
        transfer.abort()

    with scripted(node, channels=channels) as transport, ThreadPoolExecutor(1) as thread:
        aborting = thread.submit(abort)
        with pytest.raises(errors.Unavailable):
            transport.read(read_plan(node.batch, buffers, transfer=transfer)).wait()
        aborting.result()
        reuse(node, buffers, connections=channels)


def test_after_the_client_was_closed() -> None:
    node = LateNode(make_batch(1, model="late close", layout=LARGE))
    buffers = node.batch.buffers()

    def close(transport: TcpTransport) -> None:
        assert node.half_sent.acquire(timeout=20)
        transport.close()

    with scripted(node) as transport, ThreadPoolExecutor(1) as thread:
        closing = thread.submit(close, transport)
        with pytest.raises(errors.ClientClosed):
            transport.read(read_plan(node.batch, buffers)).wait()
        closing.result()
        reuse(node, buffers)


def replaced(node: LateNode, channels: int) -> tuple[ScriptedNode, TcpTransport]:
    late = ScriptedNode(node)
    return late, late.transport(channels)


@pytest.mark.parametrize("channels", [1, 2])
def test_after_the_deadline_of_a_blocking_client(store: StoreProcess, channels: int) -> None:
    node = LateNode(make_batch(2, model="late blocking", layout=LARGE))
    buffers = node.batch.buffers()
    late, transport = replaced(node, channels)
    connection = connection_to(store.url)
    with Client(connection) as client:
        offer(connection, transport)
        client.register_layout(node.batch.namespace, LARGE)
        result = client.read(node.batch.namespace, node.batch.hashes, buffers, deadline_ms=DEADLINE_MS)
        assert isinstance(result.error, errors.DeadlineExceeded)
        assert set(result.statuses) == {PageStatus.INCOMPLETE}
        reuse(node, buffers, connections=channels)
    transport.close()
    late.close()


async def deadline_of(read: asyncio.Task[attnstore.ReadResult]) -> None:
    assert isinstance((await read).error, errors.DeadlineExceeded)


async def cancel(read: asyncio.Task[attnstore.ReadResult]) -> None:
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read


async def cancel_again_and_again(read: asyncio.Task[attnstore.ReadResult]) -> None:
    while not read.done():
        read.cancel()
        await asyncio.sleep(0)
    assert read.cancelled()


async def cancel_everything(read: asyncio.Task[attnstore.ReadResult]) -> None:
    """Cancels all tasks, like the end of `asyncio.run`."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.wait([read])
    assert read.cancelled()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("end", [deadline_of, cancel, cancel_again_and_again, cancel_everything])
async def test_after_the_end_of_an_asynchronous_read(store: StoreProcess, channels: int, end: Callable[..., object]) -> None:
    node = LateNode(make_batch(2, model="late asynchronous", layout=LARGE))
    buffers = node.batch.buffers()
    late, transport = replaced(node, channels)
    deadline_ms = DEADLINE_MS if end is deadline_of else 20_000
    connection = connection_to(store.url)
    connection.choice.offer([transport, connection.grpc])
    async with AsyncClient(connection) as client:
        await client.register_layout(node.batch.namespace, LARGE)
        read = asyncio.create_task(client.read(node.batch.namespace, node.batch.hashes, buffers, deadline_ms=deadline_ms))
        for _ in range(channels):
            assert await asyncio.to_thread(node.half_sent.acquire, timeout=20)
        await end(read)  # type: ignore[misc]
        await asyncio.to_thread(reuse, node, buffers, channels)
    transport.close()
    late.close()


def test_a_transfer_that_is_over_cannot_break_the_connection_of_the_next() -> None:
    batch = make_batch(1, model="late transfer")
    first, second = Transfer(), Transfer()
    reading = threading.Event()
    aborted = threading.Event()

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.slice(frame.request, 0, batch.pages[0])
        frame, _ = end.next_request()
        reading.set()
        assert aborted.wait(20)
        end.slice(frame.request, 0, batch.pages[0])
        end.next_request()

    def abort_the_first() -> None:
        assert reading.wait(20)
        first.abort()
        aborted.set()

    with scripted(serve) as transport, ThreadPoolExecutor(1) as thread:
        transport.read(read_plan(batch, batch.buffers(), transfer=first)).wait()
        aborting = thread.submit(abort_the_first)
        plan = read_plan(batch, batch.buffers(), transfer=second)
        transport.read(plan).wait()
        aborting.result()
    assert plan.landing.result().leading_hits == 1
