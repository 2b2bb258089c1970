"""Pages written through memory lent to a real node: bytes and verdicts, peers that lie, and whoever goes away meanwhile."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attnstore
import attnstore.aio
from attnstore import DType, PageLayout, PageStatus, memory_files
from attnstore.client.bulk import WritePlan
from attnstore.client.lent import LentMemory
from attnstore.client.shm_transport import ShmTransport
from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import (
    InvalidArgument,
    NamespaceUnknown,
    PermissionDenied,
    ProtocolError,
    Retryable,
    Unavailable,
)
from attnstore.limits import SHARED_LENT_BYTES_MAX, SHARED_TAKE_PAGES_MAX
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from attnstore.wire import shared
from attnstore.wire.shared import Item, Kind
from tests.integration.shm_peer import LyingNode, Peer
from tests.samples import LARGE, SMALL, Batch, eventually, make_batch

STORED, PRESENT, NO_SPACE, MISMATCH = (
    PageStatus.STORED,
    PageStatus.ALREADY_PRESENT,
    PageStatus.NO_SPACE,
    PageStatus.CHECKSUM_MISMATCH,
)
ODD = PageLayout(layers=3, kv_heads=1, head_dim=333, block_tokens=1, dtype=DType.OPAQUE)
"""1,998 bytes a page: no multiple of a cache line."""


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "256MiB", "--stall-ms", "1000") as node:
        yield node


def registered(client: attnstore.Client, pages: int, model: str, layout: PageLayout = SMALL) -> Batch:
    batch = make_batch(pages, model=model, layout=layout)
    client.register_layout(batch.namespace, layout)
    return batch


def assert_holds(node: StoreProcess, batch: Batch) -> None:
    """As another client reads it, over another transport."""
    with attnstore.connect(node.url, transport="tcp") as client:
        client.register_layout(batch.namespace, batch.layout)
        buffers = batch.buffers()
        assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == len(batch.hashes)
    assert buffers == batch.pages


def used_bytes(node: StoreProcess) -> int:
    with attnstore.connect(node.url, transport="grpc") as client:
        return client.stats().used_bytes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pages", "layout"), [(1, SMALL), (40, LARGE), (3_000, SMALL), (500, ODD)], ids=["one", "large", "many small", "odd"]
)
def test_what_is_written_is_what_others_read(node: StoreProcess, pages: int, layout: PageLayout, channels: int) -> None:
    with attnstore.connect(node.url, transport="shm", channels=channels) as client:
        batch = registered(client, pages, f"written {pages} {layout.page_bytes} {channels}", layout)
        result = client.write(batch.namespace, batch.hashes, batch.pages)
        assert result.verdicts == (STORED,) * pages
        assert result.bytes_written == pages * layout.page_bytes
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (PRESENT,) * pages
        assert_holds(node, batch)
        client.delete(batch.namespace, batch.hashes)


def test_one_connection_serves_pages_of_several_sizes_in_turn(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batches = [registered(client, 4, f"sizes {number}", layout) for number, layout in enumerate((SMALL, LARGE, ODD) * 2)]
        for batch in batches:
            assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 4
        for batch in batches:
            assert_holds(node, batch)


def test_writing_nothing_is_nothing(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 1, "nothing")
        assert client.write(batch.namespace, [], []).verdicts == ()


def test_an_async_client_writes_so_too(node: StoreProcess) -> None:
    async def write() -> tuple[PageStatus, ...]:
        async with attnstore.aio.connect(node.url, transport="shm") as client:
            await client.register_layout(batch.namespace, batch.layout)
            return (await client.write(batch.namespace, batch.hashes, batch.pages)).verdicts

    batch = make_batch(5, model="async writer", layout=LARGE)
    assert asyncio.run(write()) == (STORED,) * 5
    assert_holds(node, batch)


def test_auto_writes_through_shared_memory_on_one_host_and_counts_it() -> None:
    port = free_port()
    with StoreProcess("--capacity", "16MiB", "--metrics-port", str(port)) as node, attnstore.connect(node.url) as client:
        batch = registered(client, 7, "auto")
        client.write(batch.namespace, batch.hashes, batch.pages)

        def counted() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                lines = answer.read().decode().splitlines()
            return (
                f'attnstore_received_bytes_total{{transport="shm"}} {7 * SMALL.page_bytes:.1f}' in lines
                and 'attnstore_pages_total{rpc="Write",status="stored"} 7.0' in lines
            )

        assert eventually(counted)


def test_a_node_that_is_full_of_leased_pages_says_so_for_each_page() -> None:
    with StoreProcess("--capacity", "1MiB") as node, attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 258, "full")
        fitting, others = slice(0, 256), slice(255, 258)
        assert client.write(batch.namespace, batch.hashes[fitting], batch.pages[fitting]).verdicts == (STORED,) * 256
        assert client.lease(batch.namespace, batch.hashes[fitting], 600_000)[0] == 256
        verdicts = client.write(batch.namespace, batch.hashes[others], batch.pages[others]).verdicts
        assert verdicts == (PRESENT, NO_SPACE, NO_SPACE)
        buffers = batch.buffers()
        assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 256
        assert buffers[fitting] == batch.pages[fitting]


def test_a_namespace_that_the_node_forgot_is_registered_again() -> None:
    with StoreProcess("--capacity", "4MiB") as first:
        address = first.address
        with attnstore.connect(first.url, transport="shm") as client:
            batch = registered(client, 5, "forgotten")
            client.write(batch.namespace, batch.hashes, batch.pages)
            first.kill()
            with StoreProcess("--capacity", "4MiB", "--listen", address) as second:
                assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 5
                assert_holds(second, batch)


# Peers that lie.


def lent(peer: Peer, pages: list[bytes]) -> int:
    """Lends the node a file of the pages, one after the other, and returns the writable descriptor."""
    data = b"".join(pages)
    file, mapping = memory_files.create("peer", -(-len(data) // 4096) * 4096)
    mapping[: len(data)] = data
    peer.stream.send_with_descriptor(shared.encode_lend(len(mapping)), file)
    peer.stream.receive(frozenset({Kind.LENT}))
    return file


def take(peer: Peer, batch: Batch, offsets: list[int], checksums: list[int] | None = None) -> list[PageStatus]:
    sums = checksums or [attnstore.page_checksum(page) for page in batch.pages]
    items = [Item(*item) for item in zip(batch.hashes, sums, offsets, strict=True)]
    answer = peer.ask(shared.encode_take(batch.namespace, items), Kind.TAKEN, Kind.REFUSED)
    if answer.kind is Kind.REFUSED:
        raise shared.decode_refusal(answer.payload)
    return shared.decode_taken(answer.payload)


@pytest.fixture
def batch(node: StoreProcess, request: pytest.FixtureRequest) -> Batch:
    """Three pages that the node does not have, in a namespace that it knows."""
    with attnstore.connect(node.url, transport="grpc") as client:
        return registered(client, 3, request.node.name)


AT = [0, 4096, 8192]


def test_a_page_whose_bytes_are_not_those_announced_is_not_stored(node: StoreProcess, batch: Batch) -> None:
    before = used_bytes(node)
    with Peer.greeted(node) as peer:
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, [0, 0, 8192]) == [STORED, MISMATCH, STORED]
        assert peer.locate(batch.namespace, *batch.hashes)[1] is PageStatus.MISSING
    assert used_bytes(node) == before + 2 * SMALL.page_bytes


def test_a_writer_that_changes_bytes_meanwhile_stores_what_it_announced_or_nothing(node: StoreProcess) -> None:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=1 << 19, block_tokens=1, dtype=DType.OPAQUE)
    batch = make_batch(1, model="scribbles", layout=layout)
    with attnstore.connect(node.url, transport="shm") as client, Peer.greeted(node) as peer:
        client.register_layout(batch.namespace, layout)
        file = lent(peer, batch.pages)
        done = threading.Event()

        def scribble() -> None:
            while not done.is_set():
                os.pwrite(file, b"\0" * 64, 500_000)
                os.pwrite(file, batch.pages[0][500_000:500_064], 500_000)

        scribbler = threading.Thread(target=scribble)
        scribbler.start()
        verdicts = set()
        try:
            for _ in range(200):
                [verdict] = take(peer, batch, [0])
                verdicts.add(verdict)
                if verdict is STORED:
                    buffers = batch.buffers()
                    assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 1
                    assert buffers == batch.pages
                    client.delete(batch.namespace, batch.hashes)
        finally:
            done.set()
            scribbler.join()
            os.close(file)
    assert verdicts <= {STORED, MISMATCH}


@pytest.mark.parametrize(
    "offset", [1, 3 * 4096, 1 << 40, (1 << 64) - 8193], ids=["across the end", "behind it", "far", "the largest"]
)
def test_a_page_outside_what_is_lent_is_refused_before_any_is_taken(node: StoreProcess, batch: Batch, offset: int) -> None:
    before = used_bytes(node)
    with Peer.greeted(node) as peer:
        os.close(lent(peer, batch.pages))
        with pytest.raises(InvalidArgument, match="no memory is lent"):
            take(peer, batch, [0, 4096, 8192 + offset])
        assert used_bytes(node) == before
        assert take(peer, batch, AT) == [STORED] * 3, "the connection goes on"


def test_nothing_is_taken_before_memory_is_lent(node: StoreProcess, batch: Batch) -> None:
    with Peer.greeted(node) as peer, pytest.raises(InvalidArgument, match="no memory is lent"):
        take(peer, batch, AT)


def test_what_is_lent_later_replaces_what_was_lent_before(node: StoreProcess, batch: Batch) -> None:
    with Peer.greeted(node) as peer:
        os.close(lent(peer, [bytes(4096)] * 3))
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, AT) == [STORED] * 3
    assert_holds(node, batch)


def test_a_namespace_of_nobody_and_one_of_another_tenant_are_refused(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('alice = "alices-token"\nbob = "bobs-token"\n')
    with StoreProcess("--capacity", "8MiB", "--tokens-file", str(tokens)) as node:
        with attnstore.connect(node.url, token="alices-token", transport="shm") as alice:
            batch = registered(alice, 1, "alices")
            with Peer.greeted(node, "bobs-token") as bob:
                os.close(lent(bob, batch.pages))
                with pytest.raises(PermissionDenied):
                    take(bob, batch, [0])
            assert alice.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,)
        with Peer.greeted(node, "bobs-token") as bob:
            os.close(lent(bob, batch.pages))
            with pytest.raises(NamespaceUnknown):
                take(bob, make_batch(1, model="nobodys"), [0])


def sealed(size_bytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    file = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


@pytest.mark.parametrize(
    ("make", "size_bytes"),
    [
        (lambda: sealed(4096, fcntl.F_SEAL_GROW), 4096),
        (lambda: os.open("/dev/null", os.O_RDONLY), 4096),
        (lambda: sealed(4096), 8192),
        (lambda: sealed(4096), 0),
        (lambda: sealed(4096), SHARED_LENT_BYTES_MAX + 1),
    ],
    ids=["could shrink", "a device", "ends too soon", "nothing", "too much"],
)
def test_a_file_that_could_kill_the_node_is_refused_and_the_node_lives(
    node: StoreProcess, batch: Batch, make: Callable[[], int], size_bytes: int
) -> None:
    descriptors = f"/proc/{node.process.pid}/fd"
    with Peer.greeted(node) as peer:
        before = len(os.listdir(descriptors))
        for _ in range(20):
            file = make()
            peer.stream.send_with_descriptor(shared.encode_lend(size_bytes), file)
            os.close(file)
            answer = peer.stream.receive(frozenset({Kind.REFUSED}))
            assert isinstance(shared.decode_refusal(answer.payload), ProtocolError)
        assert len(os.listdir(descriptors)) < before + 10, "what is refused does not stay open"
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, AT) == [STORED] * 3


def test_lending_without_a_file_ends_the_connection(node: StoreProcess) -> None:
    with Peer.greeted(node) as peer:
        assert isinstance(peer.refusal(shared.encode_lend(4096)), ProtocolError)
        assert peer.is_closed_by_the_node()


def test_more_pages_than_fit_a_request_end_the_connection_at_its_header(node: StoreProcess) -> None:
    with Peer.greeted(node) as peer:
        header = shared.encode_take(b"n" * 32, [])[:8] + (SHARED_TAKE_PAGES_MAX + 1).to_bytes(4, "little")
        assert isinstance(peer.refusal(header), ProtocolError)
        assert peer.is_closed_by_the_node()


# Whoever goes away.


def test_a_writer_that_is_killed_leaves_whole_pages_and_no_slot_taken() -> None:
    with StoreProcess("--capacity", "64MiB") as node:
        for milliseconds in (50, 80, 110):
            kill_a_writer(node, milliseconds)
        batch = make_batch(8, model="killed writer", layout=LARGE)
        with attnstore.connect(node.url, transport="tcp") as client:
            client.register_layout(batch.namespace, LARGE)

            def nothing_arrives() -> bool:
                return PageStatus.ARRIVING not in client.write(batch.namespace, batch.hashes, batch.pages).verdicts

            assert eventually(nothing_arrives)
            assert_holds(node, batch)
            client.delete(batch.namespace, batch.hashes)
        assert used_bytes(node) == 0


def kill_a_writer(node: StoreProcess, milliseconds: int) -> None:
    """Amid its writes."""
    script = (
        "import attnstore, sys\n"
        "from tests.samples import LARGE, make_batch\n"
        "client = attnstore.connect(sys.argv[1], transport='shm')\n"
        "batch = make_batch(8, model='killed writer', layout=LARGE)\n"
        "client.register_layout(batch.namespace, LARGE)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    client.write(batch.namespace, batch.hashes, batch.pages)\n"
        "    client.delete(batch.namespace, batch.hashes)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, node.url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(milliseconds / 1000)
    writer.kill()
    writer.wait()
    writer.stdout.close()


def test_a_node_that_is_killed_ends_a_write_in_time() -> None:
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url, transport="shm", deadline_ms=3_000) as client:
        batch = registered(client, 20, "killed node", LARGE)
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        killer = threading.Timer(0.02, node.kill)
        killer.start()
        began_s = time.monotonic()
        with pytest.raises(Retryable):  # noqa: PT012 - whichever call finds the node dead
            while True:
                client.write(batch.namespace, batch.hashes, batch.pages)
                client.delete(batch.namespace, batch.hashes)
        assert time.monotonic() - began_s < 6
        killer.join()


def test_a_stopped_node_ends_a_write_at_its_deadline_and_takes_later_ones(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 6, "stopped", LARGE)
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        node.suspend()
        try:
            began_s = time.monotonic()
            with pytest.raises(Retryable):
                client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=500)
            assert time.monotonic() - began_s < 2.5
        finally:
            node.resume()
        # What the node still finds of the broken call it may finish or drop; either way each page is whole.
        assert eventually(lambda: all(v.is_kept for v in client.write(batch.namespace, batch.hashes, batch.pages).verdicts))
        assert_holds(node, batch)


def test_a_cancelled_write_ends_and_its_connection_serves_nobody_else(node: StoreProcess) -> None:
    async def run() -> None:
        async with attnstore.aio.connect(node.url, transport="shm") as client:
            await client.register_layout(batch.namespace, LARGE)
            await client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
            node.suspend()
            try:
                writing = asyncio.create_task(client.write(batch.namespace, batch.hashes, batch.pages))
                await asyncio.sleep(0.2)
                writing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(writing, 5)
            finally:
                node.resume()
            for _ in range(50):
                verdicts = (await client.write(batch.namespace, batch.hashes, batch.pages)).verdicts
                if all(verdict.is_kept for verdict in verdicts):
                    return
                await asyncio.sleep(0.1)
        raise AssertionError("the node never took the pages")

    batch = make_batch(6, model="cancelled", layout=LARGE)
    asyncio.run(run())
    assert_holds(node, batch)


def test_without_memory_to_lend_auto_writes_over_tcp_and_forced_shm_says_why(
    node: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, size_bytes: int) -> object:
        raise OSError(errno.ENOMEM, f"no memory for {name} of {size_bytes}")

    monkeypatch.setattr(memory_files, "create", refuse)
    with attnstore.connect(node.url) as client:
        batch = registered(client, 2, "no memory")
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 2
    with attnstore.connect(node.url, transport="shm") as client:
        other = registered(client, 1, "no memory, forced")
        with pytest.raises(Unavailable, match="no memory"):
            client.write(other.namespace, other.hashes, other.pages)
    assert_holds(node, batch)


def test_a_node_that_has_drained_takes_no_page() -> None:
    with (
        StoreProcess("--capacity", "16MiB", "--drain-ms", "60000") as node,
        attnstore.connect(node.url, transport="shm", deadline_ms=2_000) as client,
    ):
        batch = registered(client, 2, "draining")
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(20) == 0
        with pytest.raises(Unavailable):
            client.write(batch.namespace, batch.hashes, batch.pages)


# A node that lies to a writer.


def write_to(lying: LyingNode, pages: int = 1) -> tuple[PageStatus, ...]:
    batch = make_batch(pages, model="to a liar")
    transport = ShmTransport(lambda _name, _deadline: (lying.address, b"t" * 32), channels=1)
    plan = WritePlan(batch.namespace, batch.hashes, list(map(memoryview, batch.pages)), Deadline(MonotonicClock(), 10_000))
    try:
        return transport.write(plan)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (shared.encode_taken([STORED, STORED]), "2 verdicts on 1"),
        (shared.encode_taken([]), "0 verdicts on 1"),
        (shared.encode_taken([STORED])[:-1] + b"\xfa", "250"),
        (shared.encode_lent(), "TAKEN was due"),
    ],
    ids=["too many", "too few", "no verdict", "another message"],
)
def test_answers_that_no_honest_node_gives_are_a_broken_protocol(answer: bytes, complaint: str) -> None:
    def lie(stream: shared.SharedStream, kind: Kind) -> None:
        stream.send(shared.encode_lent() if kind is Kind.LEND else answer)

    with LyingNode(lie) as node, pytest.raises(ProtocolError, match=complaint):
        write_to(node)


def test_a_call_that_was_refused_ends_with_the_nodes_last_answer() -> None:
    """Its later pages are on the way: a node that is slow would store them once whoever calls again has made them welcome."""
    answered: list[Kind] = []

    def refuse(stream: shared.SharedStream, kind: Kind) -> None:
        if kind is Kind.LEND:
            stream.send(shared.encode_lent())
            return
        if answered:
            time.sleep(0.1)
        answered.append(kind)
        stream.send(shared.encode_refusal(NamespaceUnknown("who?")))

    with LyingNode(refuse) as node:
        with pytest.raises(NamespaceUnknown):
            write_to(node, pages=7)
        assert answered == [Kind.TAKE] * 3, "of one page, of two, of four"


@pytest.mark.parametrize("page_bytes", [1, 4096, 100_000, 3 << 20, 40 << 20])
def test_lent_memory_never_gives_a_place_away_twice(page_bytes: int) -> None:
    lent = LentMemory(page_bytes)
    lent.close_file()
    page = memoryview(bytes(page_bytes))
    assert lent.size_bytes <= SHARED_LENT_BYTES_MAX
    assert lent.free >= 2
    offered: list[list[int]] = []
    for count in lent.groups(100 if page_bytes < 1 << 20 else 7):
        assert 1 <= count <= SHARED_TAKE_PAGES_MAX
        while lent.free < count:
            lent.give_back(len(offered.pop(0)))
        offered.append([lent.put(page)[1] for _ in range(count)])
        begins = sorted(begin for group in offered for begin in group)
        assert all(second - first >= page_bytes for first, second in itertools.pairwise(begins))
        assert begins[-1] + page_bytes <= lent.size_bytes
