"""Memory that changes under a real node: no transport delivers a flipped bit as valid, and the page can be written again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import attnstore
from attnstore import PageLayout, PageStatus
from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument, LeaseExpired, NamespaceUnknown
from attnstore.limits import REPORTED_HASHES_MAX
from attnstore.testing import StoreProcess
from tests.memory_files import flip_bit
from tests.samples import Batch, deleted_after_reading, eventually, make_batch

PAGE = PageLayout(layers=6, kv_heads=2, head_dim=64, block_tokens=16, dtype=DType.FP32)
ODD = PageLayout(layers=3, kv_heads=1, head_dim=25, block_tokens=5, dtype=DType.FP32)
"""Its layers are not a multiple of the checksum's blocks."""
PAGES, BAD = 6, 3
LAYERS = (2, 5)
LEASE_MS = 600_000


class Node:
    """A real node whose arena is a file, so that a test can change its memory from outside."""

    def __init__(self, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.path = Path(self._folder.name) / "arena"
        self.process = StoreProcess("--capacity", "16MiB", "--attend-threads", "1", "--arena-path", str(self.path), *options)
        self.url = self.process.url

    def flip(self, page: bytes, at: int) -> None:
        """See `flip_bit`."""
        flip_bit(self.path, page, at)

    def connect(self, transport: str) -> attnstore.Client:
        return attnstore.connect(self.url, transport=transport, shared_path=self.path)

    def close(self) -> None:
        self.process.stop()
        self._folder.cleanup()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """One node for all transports, which does not scrub."""
    node = Node("--scrub-rate", "0")
    yield node
    node.close()


Door = Callable[[attnstore.Client, Batch, attnstore.Lease | None], Sequence[PageStatus]]
"""Reads the batch, and checks the bytes of every hit."""


def read_pages(client: attnstore.Client, batch: Batch, lease: attnstore.Lease | None) -> Sequence[PageStatus]:
    buffers = batch.buffers()
    result = client.read(batch.namespace, batch.hashes, buffers, lease=lease)
    return checked(batch, result.statuses, buffers, (0, batch.layout.layers))


def read_layers(client: attnstore.Client, batch: Batch, lease: attnstore.Lease | None) -> Sequence[PageStatus]:
    layers = (LAYERS[0] % batch.layout.layers, batch.layout.layers)
    buffers = [bytearray((layers[1] - layers[0]) * batch.layout.layer_bytes) for _ in batch.pages]
    result = client.read(batch.namespace, batch.hashes, buffers, layers=layers, lease=lease)
    return checked(batch, result.statuses, buffers, layers)


def read_one_layer(client: attnstore.Client, batch: Batch, lease: attnstore.Lease | None) -> Sequence[PageStatus]:
    layers = (batch.layout.layers - 1, batch.layout.layers)
    buffers = [bytearray(batch.layout.layer_bytes) for _ in batch.pages]
    result = client.read(batch.namespace, batch.hashes, buffers, layers=layers, lease=lease)
    return checked(batch, result.statuses, buffers, layers)


def read_by_layer(client: attnstore.Client, batch: Batch, lease: attnstore.Lease | None) -> Sequence[PageStatus]:
    buffers = batch.buffers()
    leading: list[int] = []

    def on_layer(layer: int, pages: int) -> None:
        leading.append(pages)
        checked(
            batch, [PageStatus.OK] * pages, [page[: (layer + 1) * batch.layout.layer_bytes] for page in buffers], (0, layer + 1)
        )

    result = client.read(batch.namespace, batch.hashes, buffers, lease=lease, on_layer=on_layer)
    assert leading == sorted(leading, reverse=True)
    assert leading[-1] == result.leading_hits
    return checked(batch, result.statuses, buffers, (0, batch.layout.layers))


def view(client: attnstore.Client, batch: Batch, lease: attnstore.Lease | None) -> Sequence[PageStatus]:
    found = lease or client.match(batch.namespace, [[page_hash] for page_hash in batch.hashes], lease_ms=LEASE_MS).lease
    assert found is not None
    with client.view(batch.namespace, batch.hashes, lease=found) as views:
        pages = [bytes(page) if page is not None else b"" for page in views.pages]
        assert views.verify() == views.statuses
    if lease is None:
        client.release(found)
    return checked(batch, views.statuses, pages, (0, batch.layout.layers))


def checked(
    batch: Batch, statuses: Sequence[PageStatus], pages: Sequence[bytes | bytearray], layers: tuple[int, int]
) -> Sequence[PageStatus]:
    begin, end = batch.layout.layer_slice(*layers)
    for status, page, original in zip(statuses, pages, batch.pages, strict=False):
        assert status is not PageStatus.OK or page == original[begin:end], "a wrong byte came as good"
    return statuses


DOORS: dict[str, tuple[str, Door]] = {
    f"{transport}, {door.__name__}": (transport, door)
    for transport in ("grpc", "tcp", "shm")
    for door in (read_pages, read_layers, read_one_layer, read_by_layer, *([view] if transport == "shm" else []))
}


@pytest.mark.parametrize("leased", [False, True], ids=["not leased", "leased"])
@pytest.mark.parametrize("layout", [PAGE, ODD], ids=["page", "odd page"])
@pytest.mark.parametrize("door", DOORS)
def test_a_flipped_bit_is_a_miss_by_every_door_and_the_page_can_be_written_anew(
    node: Node, door: str, layout: PageLayout, leased: bool
) -> None:
    transport, read = DOORS[door]
    batch = make_batch(PAGES, model=f"{door} {layout} {leased}", layout=layout)
    with node.connect(transport) as client:
        client.register_layout(batch.namespace, layout)
        client.write(batch.namespace, batch.hashes, batch.pages)
        lease = client.lease(batch.namespace, batch.hashes, LEASE_MS)[1] if leased else None
        node.flip(batch.pages[BAD], layout.page_bytes - 1)
        statuses = read(client, batch, lease)
        assert statuses[BAD] in (PageStatus.CORRUPT, PageStatus.MISSING)
        assert all(status is PageStatus.OK for index, status in enumerate(statuses) if index != BAD)
        assert client.match(batch.namespace, [batch.hashes]).hits == (BAD,), "a corrupt page is not found"
        assert client.read(batch.namespace, batch.hashes, batch.buffers()).statuses[BAD] is PageStatus.MISSING
        verdicts = client.write(batch.namespace, batch.hashes, batch.pages).verdicts
        assert verdicts[BAD] is PageStatus.STORED
        assert set(read(client, batch, lease)) == {PageStatus.OK}
        if lease is not None:
            assert client.release(lease)
        assert deleted_after_reading(client, batch.namespace, batch.hashes) == (PageStatus.OK,) * PAGES
        assert client.stats().pages_pinned == 0


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_no_query_is_answered_from_a_page_that_has_changed(node: Node, transport: str) -> None:
    batch = make_batch(PAGES, model=f"attended over {transport}", layout=PAGE)
    with attnstore.connect(node.url, transport=transport, deadline_ms=60_000) as client:
        client.register_layout(batch.namespace, PAGE)
        client.write(batch.namespace, batch.hashes, batch.pages)
        lease = client.lease(batch.namespace, batch.hashes, LEASE_MS)[1]
        assert lease is not None
        node.flip(batch.pages[BAD], 100)
        with client.attend(batch.namespace, q_heads=4, scale=0.1) as stream, pytest.raises(LeaseExpired, match=f"page {BAD} "):
            stream.open(batch.hashes, lease)
        assert client.match(batch.namespace, [batch.hashes]).hits == (BAD,)
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts[BAD] is PageStatus.STORED
        with client.attend(batch.namespace, q_heads=4, scale=0.1) as stream:
            stream.open(batch.hashes, lease)


def test_a_page_that_a_reader_uses_in_place_is_withdrawn_from_it_when_another_reader_finds_it_corrupt(node: Node) -> None:
    batch = make_batch(PAGES, model="withdrawn", layout=PAGE)
    with node.connect("shm") as in_place, node.connect("tcp") as other:
        for client in (in_place, other):
            client.register_layout(batch.namespace, PAGE)
        in_place.write(batch.namespace, batch.hashes, batch.pages)
        lease = in_place.lease(batch.namespace, batch.hashes, LEASE_MS)[1]
        assert lease is not None
        views = in_place.view(batch.namespace, batch.hashes, lease=lease)
        assert views.verify() == (PageStatus.OK,) * PAGES
        node.flip(batch.pages[BAD], 0)
        assert other.read(batch.namespace, batch.hashes, batch.buffers()).statuses[BAD] is PageStatus.CORRUPT
        assert views.verify() == tuple(PageStatus.MISSING if index == BAD else PageStatus.OK for index in range(PAGES))


def test_a_report_of_pages_that_are_intact_changes_nothing(node: Node) -> None:
    batch = make_batch(PAGES, model="intact", layout=PAGE)
    with node.connect("tcp") as client:
        with pytest.raises(NamespaceUnknown):
            client.verify(batch.namespace, batch.hashes)
        client.register_layout(batch.namespace, PAGE)
        client.write(batch.namespace, batch.hashes[1:], batch.pages[1:])
        before = client.stats()
        assert client.verify(batch.namespace, batch.hashes) == (PageStatus.MISSING, *[PageStatus.OK] * (PAGES - 1))
        after = client.stats()
        assert (after.verified_pages, after.corrupt_pages) == (before.verified_pages + PAGES - 1, before.corrupt_pages)
        assert client.match(batch.namespace, [batch.hashes[1:]]).hits == (PAGES - 1,)
        with pytest.raises(InvalidArgument, match=f"at most {REPORTED_HASHES_MAX}"):
            client.verify(batch.namespace, [bytes(32)] * (REPORTED_HASHES_MAX + 1))


def test_the_scrubber_finds_what_nobody_reads_and_counts_it() -> None:
    node = Node("--scrub-rate", "64MiB")
    batch = make_batch(40, model="scrubbed", layout=PAGE)
    try:
        with node.connect("tcp") as client:
            client.register_layout(batch.namespace, PAGE)
            client.write(batch.namespace, batch.hashes, batch.pages)
            lease = client.lease(batch.namespace, batch.hashes[:20], LEASE_MS)[1]
            assert lease is not None
            node.flip(batch.pages[7], 0)
            node.flip(batch.pages[30], PAGE.page_bytes - 1)
            assert eventually(lambda: client.stats().corrupt_pages == 2, within_s=30.0)
            assert client.match(batch.namespace, [batch.hashes]).hits == (7,)
            assert client.match(batch.namespace, [batch.hashes[8:]]).hits == (22,)
            seen = client.stats().verified_pages
            assert eventually(lambda: client.stats().verified_pages > seen + 40, within_s=30.0), "it goes on"
            assert client.stats().corrupt_pages == 2
            assert client.release(lease)
            assert client.stats().pages_pinned == 0
            assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts.count(PageStatus.STORED) == 2
            buffers = batch.buffers()
            assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 40
            assert buffers == batch.pages
        assert node.process.log.count("page no longer matched its checksums") == 2
    finally:
        node.close()
