"""Nodes and callers that die, stop or stall: every call ends in time, verified bytes are right, and no slot is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.core.hashing import page_checksum
from attnstore.limits import CHUNK_BYTES_MAX
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from attnstore.wire.messages import ERROR_TRAILER
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.samples import LARGE, SMALL, Batch, eventually, make_batch

BatchOf = Callable[..., Batch]
GRACE_S = 2.0
"""How long after its deadline a call may end on a busy machine."""

transports = pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@transports
def test_a_node_that_is_not_there_is_unavailable_and_found_when_it_comes(batch_of: BatchOf, transport: str) -> None:
    address, batch = f"127.0.0.1:{free_port()}", batch_of(1)
    with attnstore.connect(f"grpc://{address}", deadline_ms=5_000, transport=transport) as client:
        began_s = time.monotonic()
        with pytest.raises(errors.Unavailable):
            client.register_layout(batch.namespace, SMALL)
        assert time.monotonic() - began_s < 5 + GRACE_S
        with StoreProcess("--listen", address, "--capacity", "1MiB"):

            def is_found() -> bool:
                try:
                    return client.register_layout(batch.namespace, SMALL) > 0
                except errors.Unavailable:
                    return False

            assert eventually(is_found)
            assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (PageStatus.STORED,)


@transports
def test_a_restarted_node_is_empty_and_clients_go_on(batch_of: BatchOf, transport: str) -> None:
    small, large = batch_of(2), batch_of(2, LARGE, suffix="large")
    first = StoreProcess("--capacity", "64MiB")
    with attnstore.connect(first.url, deadline_ms=5_000, transport=transport) as client:
        for batch in (small, large):
            client.register_layout(batch.namespace, batch.layout)
            client.write(batch.namespace, batch.hashes, batch.pages)
        epoch = client.describe().epoch
        first.kill()
        gone = client.read(small.namespace, small.hashes, small.buffers())
        assert isinstance(gone.error, errors.Unavailable)
        assert gone.statuses == (PageStatus.INCOMPLETE,) * 2
        with pytest.raises(errors.Unavailable):
            client.write(small.namespace, small.hashes, small.pages)
        with StoreProcess("--listen", first.address, "--capacity", "64MiB"):
            assert eventually(lambda: client.read(small.namespace, small.hashes, small.buffers()).error is None)
            assert client.describe().epoch != epoch
            assert client.match(small.namespace, [small.hashes]).hits == (0,)
            # The refusal of the forgotten namespace arrives while pages are still being sent, and is understood nevertheless. A
            # page after the refused one may find its namespace there and be stored by the first attempt.
            assert eventually(lambda: _keeps(client, large))
            buffers = large.buffers()
            assert client.read(large.namespace, large.hashes, buffers).leading_hits == 2
            assert buffers == large.pages


def _keeps(client: attnstore.Client, batch: Batch) -> bool:
    return all(verdict.is_kept for verdict in client.write(batch.namespace, batch.hashes, batch.pages).verdicts)


def test_a_watch_finds_a_restarted_node_too(batch_of: BatchOf) -> None:
    batch = batch_of(1)
    first = StoreProcess("--capacity", "1MiB")
    with attnstore.connect(first.url, deadline_ms=5_000) as client:
        client.register_layout(batch.namespace, SMALL)
        watch = client.watch(batch.namespace)
        first.kill()
        with pytest.raises(errors.Unavailable):
            next(watch)
        with StoreProcess("--listen", first.address, "--capacity", "1MiB"):
            assert eventually(lambda: _answers(client))
            watch = client.watch(batch.namespace)
            client.write(batch.namespace, batch.hashes, batch.pages)
            assert next(watch).hash == batch.hashes[0]


def _answers(client: attnstore.Client) -> bool:
    try:
        client.describe()
    except errors.Retryable:
        return False
    return True


@transports
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_stops_during_a_read_leaves_verified_pages_and_an_error(
    node: StoreProcess, batch_of: BatchOf, pool: ThreadPoolExecutor, transport: str, how: signal.Signals
) -> None:
    batch = batch_of(8, LARGE)
    deadline_ms = 1_500
    with attnstore.connect(node.url, transport=transport) as client:
        client.register_layout(batch.namespace, LARGE)
        client.write(batch.namespace, batch.hashes, batch.pages)
        # Far more than can arrive before the node stops: it stops when the last of the first eight pages has arrived.
        scratch = bytearray(LARGE.page_bytes)
        buffers = batch.buffers()
        hashes = batch.hashes + batch.hashes[:1] * 20_000
        reading = pool.submit(client.read, batch.namespace, hashes, buffers + [scratch] * 20_000, deadline_ms=deadline_ms)
        began_s = time.monotonic()
        assert eventually(lambda: buffers[-1][-64:] == batch.pages[-1][-64:] and any(scratch))
        node.process.send_signal(how)
        answer = reading.result(deadline_ms / 1000 + 10)
        assert time.monotonic() - began_s < deadline_ms / 1000 + GRACE_S
    expected = errors.Unavailable if how is signal.SIGKILL else errors.DeadlineExceeded
    assert isinstance(answer.error, expected)
    assert answer.statuses[:8] == (PageStatus.OK,) * 8
    assert buffers == batch.pages
    assert set(answer.statuses) == {PageStatus.OK, PageStatus.INCOMPLETE}
    assert answer.bytes_read == answer.statuses.count(PageStatus.OK) * LARGE.page_bytes


@transports
def test_every_call_to_a_stopped_node_ends_within_its_deadline(node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(4, LARGE)
    with attnstore.connect(node.url, deadline_ms=300, transport=transport) as client:
        client.register_layout(batch.namespace, LARGE, deadline_ms=5_000)
        client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=5_000)
        node.suspend()
        for call in (
            client.describe,
            client.stats,
            lambda: client.register_layout(batch.namespace, LARGE),
            lambda: client.match(batch.namespace, [batch.hashes]),
            lambda: client.write(batch.namespace, batch.hashes, batch.pages),
            lambda: client.delete(batch.namespace, batch.hashes),
            lambda: client.watch(batch.namespace),
            lambda: client.renew(attnstore.Lease(b"another lease id", 1), 1),
        ):
            began_s = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded):
                call()
            assert time.monotonic() - began_s < 0.3 + GRACE_S
        answer = client.read(batch.namespace, batch.hashes, batch.buffers())
        assert isinstance(answer.error, errors.DeadlineExceeded)
        node.resume()
        buffers = batch.buffers()
        assert eventually(lambda: client.read(batch.namespace, batch.hashes, buffers, deadline_ms=5_000).leading_hits == 4)
        assert buffers == batch.pages


async def test_a_short_deadline_holds_beside_a_call_with_a_long_one(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    async with attnstore.aio.connect(node.url, deadline_ms=20_000) as client:
        await client.register_layout(batch.namespace, SMALL)
        node.suspend()
        # The first call asks the stopped node for its transports; the second needs to know them too.
        patient = asyncio.create_task(client.write(batch.namespace, batch.hashes, batch.pages))
        await asyncio.sleep(0.05)
        began_s = time.monotonic()
        answer = await client.read(batch.namespace, batch.hashes, batch.buffers(), deadline_ms=300)
        assert isinstance(answer.error, errors.DeadlineExceeded)
        assert time.monotonic() - began_s < 0.3 + GRACE_S
        node.resume()
        assert (await patient).verdicts == (PageStatus.STORED,)


def test_a_slow_handshake_is_waited_for(node: StoreProcess, pool: ThreadPoolExecutor) -> None:
    node.suspend()
    with attnstore.connect(node.url, deadline_ms=20_000) as client:
        asked = pool.submit(client.describe)
        time.sleep(0.5)
        node.resume()
        assert asked.result(30).capacity_bytes == 64 << 20


WRITER = """
import sys, time
import attnstore
from tests.samples import LARGE, make_batch
url, model, transport = sys.argv[1:]
batch = make_batch(12, model=model, layout=LARGE)
with attnstore.connect(url, deadline_ms=60_000, transport=transport) as client:
    client.register_layout(batch.namespace, LARGE)
    print("writing", flush=True)
    while True:
        client.write(batch.namespace, batch.hashes, batch.pages)
        client.delete(batch.namespace, batch.hashes)
"""


@transports
def test_a_writer_that_is_killed_leaks_no_slot_and_leaves_no_wrong_page(node: StoreProcess, transport: str) -> None:
    batch = make_batch(12, model="killed writer", layout=LARGE)
    with attnstore.connect(node.url, transport=transport) as client:
        client.register_layout(batch.namespace, LARGE)
        for pages_written in (1, 20, 50):
            before = client.stats().stored_pages
            writer = subprocess.Popen([sys.executable, "-c", WRITER, node.url, "killed writer", transport], stdout=subprocess.PIPE)
            try:
                assert eventually(lambda: client.stats().stored_pages >= before + pages_written, 20)  # noqa: B023
            finally:
                writer.kill()
                writer.communicate()
            assert eventually(lambda: client.stats().pages_arriving == 0)
            stats = client.stats()
            assert stats.used_bytes == stats.pages_sealed * LARGE.page_bytes
            buffers = batch.buffers()
            answer = client.read(batch.namespace, batch.hashes, buffers)
            assert set(answer.statuses) <= {PageStatus.OK, PageStatus.MISSING}
            for status, buffer, page in zip(answer.statuses, buffers, batch.pages, strict=True):
                assert not status.is_hit or buffer == page


@pytest.fixture
def hasty_node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--stall-ms", "300") as node:
        yield node


def test_a_writer_that_stalls_loses_its_call_and_its_slot(hasty_node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1, LARGE)
    end = threading.Event()

    def half_a_page() -> Iterator[pb.WriteChunk]:
        page = batch.pages[0]
        yield pb.WriteChunk(
            namespace=batch.namespace,
            hash=batch.hashes[0],
            checksum=page_checksum(page),
            payload=page[:CHUNK_BYTES_MAX],
        )
        end.wait(20)

    with attnstore.connect(hasty_node.url) as client, grpc.insecure_channel(hasty_node.address) as channel:
        client.register_layout(batch.namespace, LARGE)
        with pytest.raises(grpc.RpcError) as caught:
            store_pb2_grpc.AttentionStoreStub(channel).Write(half_a_page(), timeout=10)
        end.set()
        assert dict(caught.value.trailing_metadata())[ERROR_TRAILER] == "deadline_exceeded"
        assert "--stall-ms" in caught.value.details()
        stats = client.stats()
        assert (stats.pages_arriving, stats.used_bytes) == (0, 0)


def test_a_reader_that_stalls_loses_its_call_and_its_pins(hasty_node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(8, LARGE)
    with attnstore.connect(hasty_node.url) as client, grpc.insecure_channel(hasty_node.address) as channel:
        client.register_layout(batch.namespace, LARGE)
        client.write(batch.namespace, batch.hashes, batch.pages)
        request = pb.ReadRequest(namespace=batch.namespace, hashes=b"".join(batch.hashes * 8))
        stream = store_pb2_grpc.AttentionStoreStub(channel).Read(request, timeout=20)
        assert next(stream).status == PageStatus.OK
        assert client.stats().pages_pinned == 1
        assert eventually(lambda: client.stats().pages_pinned == 0)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert dict(caught.value.trailing_metadata())[ERROR_TRAILER] == "deadline_exceeded"
    assert "call failed" not in hasty_node.log


def test_callers_that_vanish_leave_no_trace_in_the_log(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(8, LARGE)
    with attnstore.connect(node.url) as client:
        client.register_layout(batch.namespace, LARGE)
        client.write(batch.namespace, batch.hashes, batch.pages)
        request = pb.ReadRequest(namespace=batch.namespace, hashes=b"".join(batch.hashes * 20))
        for _ in range(5):
            channel = grpc.insecure_channel(node.address)
            stream = store_pb2_grpc.AttentionStoreStub(channel).Read(request, timeout=20)
            next(stream)
            channel.close()
        assert eventually(lambda: client.describe().in_flight == 0)
        assert client.stats().pages_pinned == 0
    assert "call failed" not in node.log
    assert "Traceback" not in node.log
