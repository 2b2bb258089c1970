"""Writing and reading pages: a wrong call is refused with a typed error, an unavailable page is a status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.limits import HASHES_MAX, LEASE_MS_MAX
from attnstore.testing import StoreProcess
from tests.samples import LARGE, SMALL, Batch, eventually

BatchOf = Callable[..., Batch]
OK, MISSING, STORED = PageStatus.OK, PageStatus.MISSING, PageStatus.STORED


@pytest.fixture
def tiny_node() -> Iterator[StoreProcess]:
    """Room for four small pages."""
    with StoreProcess("--capacity", str(4 * SMALL.page_bytes)) as node:
        yield node


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])
def test_what_was_written_is_read_byte_for_byte(client: attnstore.Client, batch_of: BatchOf, layout: attnstore.PageLayout) -> None:
    batch = batch_of(3, layout)
    assert client.register_layout(batch.namespace, layout) == 64 * (1 << 20) // layout.page_bytes // 8 * 8
    written = client.write(batch.namespace, batch.hashes, batch.pages)
    assert (written.verdicts, written.bytes_written) == ((STORED,) * 3, 3 * layout.page_bytes)
    buffers = batch.buffers()
    answer = client.read(batch.namespace, batch.hashes, buffers)
    assert (answer.statuses, answer.bytes_read, answer.error) == ((OK,) * 3, 3 * layout.page_bytes, None)
    assert buffers == batch.pages


def test_a_layer_range_is_that_slice_of_each_page(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(2, LARGE)
    client.register_layout(batch.namespace, LARGE)
    client.write(batch.namespace, batch.hashes, batch.pages)
    begin, end = LARGE.layer_slice(1, 4)
    buffers = [bytearray(end - begin) for _ in batch.pages]
    assert client.read(batch.namespace, batch.hashes, buffers, layers=(1, 4)).leading_hits == 2
    assert buffers == [page[begin:end] for page in batch.pages]
    for wrong in ((3, 3), (4, 2), (0, 6), (-1, 2)):
        with pytest.raises(errors.InvalidArgument, match="layer range"):
            client.read(batch.namespace, batch.hashes, buffers, layers=wrong)


def test_buffers_may_be_any_writable_memory(client: attnstore.Client, batch_of: BatchOf) -> None:
    np = pytest.importorskip("numpy")
    batch = batch_of(2)
    client.register_layout(batch.namespace, SMALL)
    arrays = [np.frombuffer(page, dtype="<f4").reshape(SMALL.shape) for page in batch.pages]
    client.write(batch.namespace, batch.hashes, arrays)
    pool = np.zeros((2, *SMALL.shape), dtype="<f4")
    assert client.read(batch.namespace, batch.hashes, list(pool)).leading_hits == 2
    assert pool.tobytes() == b"".join(batch.pages)


def test_a_page_is_written_once(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(2)
    client.register_layout(batch.namespace, SMALL)
    assert client.write(batch.namespace, batch.hashes[:1], batch.pages[:1]).verdicts == (STORED,)
    again = client.write(batch.namespace, batch.hashes, batch.pages)
    assert again.verdicts == (PageStatus.ALREADY_PRESENT, STORED)
    assert again.bytes_written == SMALL.page_bytes


def test_missing_pages_are_misses_between_hits(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(3)
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes[::2], batch.pages[::2])
    buffers = batch.buffers()
    answer = client.read(batch.namespace, batch.hashes, buffers)
    assert answer.statuses == (OK, MISSING, OK)
    assert answer.leading_hits == 1
    assert buffers[::2] == batch.pages[::2]
    assert client.match(batch.namespace, [batch.hashes, batch.hashes[2:], []]).hits == (1, 1, 0)


def test_deleted_pages_are_gone_and_leased_ones_stay(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(3)
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes[:2], batch.pages[:2])
    hits, lease = client.lease(batch.namespace, batch.hashes[:1], 60_000)
    assert hits == 1
    assert lease is not None
    assert client.delete(batch.namespace, batch.hashes) == (PageStatus.PINNED, OK, MISSING)
    assert client.release(lease)
    assert not client.release(lease)
    assert client.delete(batch.namespace, batch.hashes[:1]) == (OK,)
    assert client.match(batch.namespace, [batch.hashes]).hits == (0,)


def test_empty_batches_are_answered_with_nothing(client: attnstore.Client, batch_of: BatchOf) -> None:
    space = batch_of(1).namespace
    client.register_layout(space, SMALL)
    assert client.match(space, []).hits == ()
    assert client.match(space, [[]], lease_ms=1_000) == attnstore.MatchResult((0,), None)
    assert client.read(space, [], []).statuses == ()
    assert client.write(space, [], []).verdicts == ()
    assert client.delete(space, []) == ()
    assert client.lease(space, [], 1_000) == (0, None)


def test_batches_larger_than_the_limit_are_refused_before_they_are_sent(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    client.register_layout(batch.namespace, SMALL)
    many = [batch.hashes[0]] * (HASHES_MAX + 1)
    buffer = bytearray(SMALL.page_bytes)
    for call in (
        lambda: client.match(batch.namespace, [many]),
        lambda: client.match(batch.namespace, [many[:60_000], many[:60_000]]),
        lambda: client.delete(batch.namespace, many),
        lambda: client.read(batch.namespace, many, [buffer] * len(many)),
        lambda: client.write(batch.namespace, many, [batch.pages[0]] * len(many)),
    ):
        with pytest.raises(errors.InvalidArgument, match=str(HASHES_MAX)):
            call()


def test_the_largest_batch_is_served(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes, batch.pages)
    many = [batch.hashes[0]] * HASHES_MAX
    assert client.match(batch.namespace, [many], deadline_ms=30_000).hits == (HASHES_MAX,)
    assert client.delete(batch.namespace, many, deadline_ms=30_000).count(MISSING) == HASHES_MAX - 1


def test_a_namespace_keeps_its_layout(client: attnstore.Client, batch_of: BatchOf) -> None:
    space = batch_of(1).namespace
    client.register_layout(space, SMALL)
    client.register_layout(space, SMALL)
    with pytest.raises(errors.LayoutMismatch, match="registered with"):
        client.register_layout(space, LARGE)


def test_a_page_larger_than_the_node_can_hold_is_refused_at_registration(tiny_node: StoreProcess) -> None:
    with attnstore.connect(tiny_node.url) as client, pytest.raises(errors.InvalidArgument, match="block_tokens"):
        client.register_layout(attnstore.namespace(LARGE, model=b"m"), LARGE)


def test_a_namespace_must_be_registered_by_the_client(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    for call in (
        lambda: client.match(batch.namespace, [batch.hashes]),
        lambda: client.read(batch.namespace, batch.hashes, batch.buffers()),
        lambda: client.write(batch.namespace, batch.hashes, batch.pages),
        lambda: client.delete(batch.namespace, batch.hashes),
        lambda: client.watch(batch.namespace),
    ):
        with pytest.raises(errors.NamespaceUnknown, match="register"):
            call()


def test_malformed_arguments_name_the_rule(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(2)
    client.register_layout(batch.namespace, SMALL)
    one, page, buffer = batch.hashes[:1], batch.pages[:1], [bytearray(SMALL.page_bytes)]
    for call, expected, message in (
        (lambda: client.register_layout(b"short", SMALL), errors.InvalidArgument, "32"),
        (lambda: client.match(batch.namespace, [[b"short"]]), errors.InvalidArgument, "32"),
        (lambda: client.read(batch.namespace, [b"short"], buffer), errors.InvalidArgument, "32"),
        (lambda: client.write(batch.namespace, [b"short"], page), errors.InvalidArgument, "32"),
        (lambda: client.delete(batch.namespace, [b"short"]), errors.InvalidArgument, "32"),
        (lambda: client.write(batch.namespace, batch.hashes, page), errors.InvalidArgument, "2 hashes and 1 pages"),
        (lambda: client.write(batch.namespace, one, [page[0][:-1]]), errors.BufferMismatch, "4095"),
        (lambda: client.write(batch.namespace, one, [page[0] + b"x"]), errors.BufferMismatch, "4097"),
        (lambda: client.read(batch.namespace, batch.hashes, buffer), errors.BufferMismatch, "2 pages"),
        (lambda: client.read(batch.namespace, one, [bytearray(9)]), errors.BufferMismatch, "9 bytes"),
        (lambda: client.read(batch.namespace, one, [bytes(4096)]), errors.BufferMismatch, "read-only"),
        (lambda: client.read(batch.namespace, one, [memoryview(bytearray(8192))[::2]]), errors.BufferMismatch, "contiguous"),
        (lambda: client.match(batch.namespace, [one], lease_ms=-1), errors.InvalidArgument, "lease_ms"),
        (lambda: client.match(batch.namespace, [one], lease_ms=LEASE_MS_MAX + 1), errors.InvalidArgument, "lease_ms"),
        (lambda: client.match(batch.namespace, [one], deadline_ms=0), errors.InvalidArgument, "deadline_ms"),
        (lambda: client.match(batch.namespace, [one], deadline_ms=float("nan")), errors.InvalidArgument, "deadline_ms"),
        (lambda: client.watch(batch.namespace, deadline_ms=-1), errors.InvalidArgument, "deadline_ms"),
    ):
        with pytest.raises(expected, match=message):
            call()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("127.0.0.1:7400", {}, "grpc://host:port"),
        ("http://127.0.0.1:7400", {}, "grpc://host:port"),
        ("grpc://127.0.0.1", {}, "host:port"),
        ("grpc://127.0.0.1:99999", {}, "65535"),
        ("grpc://127.0.0.1:7400", {"deadline_ms": 0}, "deadline_ms"),
        ("grpc://127.0.0.1:7400", {"deadline_ms": float("inf")}, "deadline_ms"),
        ("grpc://127.0.0.1:7400", {"token": "a b"}, "token"),
        ("grpc://127.0.0.1:7400", {"tls_ca": "ca.pem"}, "grpcs://"),
        ("grpcs://127.0.0.1:7400", {"tls_ca": "no-such-file.pem"}, "no-such-file.pem"),
        ("grpc://127.0.0.1:7400", {"transport": "carrier-pigeon"}, "transport"),
    ],
)
def test_connect_refuses_what_cannot_work(target: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        attnstore.connect(target, **options)  # type: ignore[arg-type]


def test_a_token_is_not_shown_by_accident() -> None:
    options = attnstore.client.ConnectOptions.create(
        "grpc://127.0.0.1:1", deadline_ms=1, token="s3cret", tls_ca=None, transport="grpc", channels=1
    )
    assert "s3cret" not in repr(options)


def test_an_expired_lease_is_a_miss_for_readers_and_an_error_for_renewal(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(2)
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes, batch.pages)
    found = client.match(batch.namespace, [batch.hashes], lease_ms=60_000)
    assert found.lease is not None
    assert client.read(batch.namespace, batch.hashes, batch.buffers(), lease=found.lease).leading_hits == 2
    assert client.renew(found.lease, 1).lease_ms > 50_000, "a renewal never shortens a lease"
    short = client.match(batch.namespace, [batch.hashes], lease_ms=1).lease
    assert short is not None
    expired = (PageStatus.LEASE_EXPIRED,) * 2
    assert eventually(lambda: client.read(batch.namespace, batch.hashes, batch.buffers(), lease=short).statuses == expired)
    with pytest.raises(errors.LeaseExpired, match="match again"):
        client.renew(short, 1_000)
    assert not client.release(short)
    assert client.release(found.lease)
    stranger = attnstore.Lease(b"another lease id", 1_000)
    assert client.read(batch.namespace, batch.hashes, batch.buffers(), lease=stranger).statuses == expired


def test_a_full_store_evicts_the_oldest_and_never_what_is_leased(tiny_node: StoreProcess, batch_of: BatchOf) -> None:
    with attnstore.connect(tiny_node.url) as client:
        batch = batch_of(7)
        assert client.register_layout(batch.namespace, SMALL) == 4
        client.write(batch.namespace, batch.hashes[:4], batch.pages[:4])
        found = client.match(batch.namespace, [batch.hashes[1:4]], lease_ms=60_000)
        assert found.hits == (3,)
        # One page is evictable: it goes for the first new page, which itself goes for the next.
        assert client.write(batch.namespace, batch.hashes[4:6], batch.pages[4:6]).verdicts == (STORED, STORED)
        last = client.match(batch.namespace, [batch.hashes[5:6]], lease_ms=60_000)
        assert last.lease is not None
        full = client.write(batch.namespace, batch.hashes[3:], batch.pages[3:])
        assert full.verdicts == (
            PageStatus.ALREADY_PRESENT,
            PageStatus.NO_SPACE,
            PageStatus.ALREADY_PRESENT,
            PageStatus.NO_SPACE,
        )
        stats = client.stats()
        assert (stats.used_bytes, stats.pages_pinned, stats.pages_arriving) == (stats.capacity_bytes, 4, 0)
        assert client.release(last.lease)
        assert client.write(batch.namespace, batch.hashes[6:], batch.pages[6:]).verdicts == (STORED,)
        buffers = batch.buffers()[1:4]
        assert client.read(batch.namespace, batch.hashes[1:4], buffers).leading_hits == 3
        assert buffers == batch.pages[1:4]


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_statistics_count_look_ups_once_and_reads_apart(node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    with attnstore.connect(node.url, transport=transport) as client:
        batch = batch_of(4)
        client.register_layout(batch.namespace, SMALL)
        client.write(batch.namespace, batch.hashes[:3], batch.pages[:3])
        client.write(batch.namespace, batch.hashes[:3], batch.pages[:3])
        found = client.match(batch.namespace, [batch.hashes], lease_ms=60_000)
        client.read(batch.namespace, batch.hashes, batch.buffers())
        client.read(batch.namespace, batch.hashes[:1], [bytearray(SMALL.layer_bytes)], layers=(0, 1))
        stats = client.stats()
        assert found.lease is not None
        assert (stats.pages_sealed, stats.pages_arriving, stats.pages_pinned, stats.leases) == (3, 0, 3, 1)
        assert (stats.hit_pages, stats.missed_pages, stats.stored_pages, stats.evicted_pages) == (3, 1, 3, 0)
        assert stats.hit_rate == 3 / 4, "what is read after it was looked up is no second look-up"
        # Bytes are counted after they are sent, and the reader of the last page may have them a moment earlier.
        assert eventually(lambda: client.stats().read_pages == 3 + 1)
        # A reader of shared memory copies what it needs, so the whole page counts as handed over.
        part = SMALL.page_bytes if transport == "shm" else SMALL.layer_bytes
        assert client.stats().read_bytes == 3 * SMALL.page_bytes + part
        assert stats.written_bytes == stats.used_bytes == 3 * SMALL.page_bytes
        assert [(space.namespace, space.layout, space.pages_sealed) for space in stats.namespaces] == [(batch.namespace, SMALL, 3)]


def test_a_node_describes_itself(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        about = client.describe()
    assert about.node_id == node.address
    assert len(about.epoch) == 16
    assert (about.capacity_bytes, about.used_bytes, about.in_flight, about.draining) == (64 << 20, 0, 0, False)
    assert (about.hashes_max, about.lease_ms_max, about.page_bytes_max) == (HASHES_MAX, LEASE_MS_MAX, 8 << 20)
    assert {"grpc", "tcp"} <= set(about.transports)


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
async def test_asynchronous_clients_serve_many_tasks(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    async with attnstore.aio.connect(shared_node.url, transport=transport) as client:
        batches = [batch_of(5, suffix=str(number)) for number in range(8)]

        async def round_trip(batch: Batch) -> bool:
            await client.register_layout(batch.namespace, SMALL)
            await client.write(batch.namespace, batch.hashes, batch.pages)
            buffers = batch.buffers()
            answer = await client.read(batch.namespace, batch.hashes, buffers)
            return answer.leading_hits == 5 and buffers == batch.pages

        assert all(await asyncio.gather(*map(round_trip, batches)))


def test_every_call_ends_within_its_deadline_even_where_the_default_is_long(client: attnstore.Client, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    client.register_layout(batch.namespace, SMALL)
    watch = client.watch(batch.namespace, deadline_ms=200)
    began_s = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        next(watch)
    assert time.monotonic() - began_s < 2.2
