"""The shm transport with real nodes: bytes, places that become invalid under a reader, and nodes that disappear."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnstore
import attnstore.aio
from attnstore import DType, PageLayout, PageStatus, copying
from attnstore.client.transports.mapped import MappedExtent
from attnstore.copying import Checksums
from attnstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from attnstore.testing import StoreProcess
from attnstore.wire.shm import Place
from tests.integration.shm_peer import Peer, open_channel
from tests.samples import LARGE, SMALL, Batch, make_batch

OK, MISSING, CORRUPT, INCOMPLETE = PageStatus.OK, PageStatus.MISSING, PageStatus.CORRUPT, PageStatus.INCOMPLETE
PAGE = PageLayout(layers=4, kv_heads=1, head_dim=1024, block_tokens=16, dtype=DType.OPAQUE)
"""128 KiB per page."""


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    """A node whose scrubber removes no corrupt page before a reader finds it."""
    with StoreProcess("--capacity", "64MiB", "--scrub-rate", "0") as node:
        yield node


@pytest.fixture
def small_node() -> Iterator[StoreProcess]:
    """Room for 32 pages."""
    with StoreProcess("--capacity", "4MiB") as node:
        yield node


def stored(client: attnstore.Client, pages: int, model: str, layout: PageLayout = PAGE) -> Batch:
    batch = make_batch(pages, model=model, layout=layout)
    client.register_layout(batch.namespace, layout)
    assert all(verdict.is_kept for verdict in client.write(batch.namespace, batch.hashes, batch.pages).verdicts)
    return batch


def flood(client: attnstore.Client, pages: int = 64) -> None:
    """Recycles every unleased slot of the small node."""
    stored(client, pages, model=f"flood {os.urandom(8).hex()}")


def mapped_files() -> set[str]:
    """Returns the extents that this process has mapped, of any node, by inode."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "attnstore-extent" in line}


def test_pages_are_read_byte_for_byte_with_misses_in_between(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = stored(client, 5, "with misses", LARGE)
        hashes = [*batch.hashes[:2], attnstore.BlockHash(b"?" * 32), *batch.hashes[2:]]
        buffers = [bytearray(LARGE.page_bytes) for _ in hashes]
        answer = client.read(batch.namespace, hashes, buffers)
    assert (answer.statuses, answer.error) == ((OK, OK, MISSING, OK, OK, OK), None)
    assert [*buffers[:2], *buffers[3:]] == batch.pages


def test_a_huge_batch_is_located_in_parts_and_read_whole(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = stored(client, 5_000, "huge batch", SMALL)
        buffers = batch.buffers()
        assert set(client.read(batch.namespace, batch.hashes, buffers).statuses) == {OK}
        assert buffers == batch.pages
        lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
        assert lease is not None
        with client.view(batch.namespace, batch.hashes, lease=lease) as views:
            assert list(map(bytes, filter(None, views.pages))) == batch.pages


def test_on_layer_hears_of_every_layer_when_the_pages_are_there(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = stored(client, 3, "on layer")
        heard: list[tuple[int, int]] = []
        answer = client.read(
            batch.namespace, batch.hashes, batch.buffers(), on_layer=lambda layer, pages: heard.append((layer, pages))
        )
    assert answer.leading_hits == 3
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_views_are_the_nodes_memory_itself_and_read_only(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="auto") as client:
        batch = stored(client, 3, "views")
        lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
        assert lease is not None
        hashes = [*batch.hashes, attnstore.BlockHash(b"?" * 32)]
        with client.view(batch.namespace, hashes, lease=lease) as views:
            assert views.statuses == views.verify() == (OK, OK, OK, MISSING)
            assert views.pages[3] is None
            assert not views.valid(3)
            for view, page in zip(views.pages, batch.pages, strict=False):
                assert view is not None
                assert view.readonly
                assert view == page
        held = views.pages[0]
        assert held is not None
        with pytest.raises(ValueError, match="released"):
            bytes(held)
        begin, end = PAGE.layer_slice(1, 3)
        with client.view(batch.namespace, batch.hashes, lease=lease, layers=(1, 3)) as views:
            assert [bytes(view) for view in views.pages if view is not None] == [page[begin:end] for page in batch.pages]


def test_an_array_made_of_a_view_keeps_the_memory_mapped(node: StoreProcess) -> None:
    np = pytest.importorskip("numpy")
    with attnstore.connect(node.url) as client:
        batch = stored(client, 1, "array")
        lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
        assert lease is not None
        with client.view(batch.namespace, batch.hashes, lease=lease) as views:
            array = np.frombuffer(views.pages[0], np.uint8)
    assert array.tobytes() == batch.pages[0]


def test_a_view_wants_a_lease_that_lives(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        batch = stored(client, 2, "lease")
        lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
        assert lease is not None
        client.release(lease)
        with client.view(batch.namespace, batch.hashes, lease=lease) as views:
            assert views.statuses == (PageStatus.LEASE_EXPIRED,) * 2


def test_an_async_client_views_pages_too(node: StoreProcess) -> None:
    async def view() -> list[bytes]:
        async with attnstore.aio.connect(node.url) as client:
            batch = make_batch(2, model="async view", layout=PAGE)
            await client.register_layout(batch.namespace, PAGE)
            await client.write(batch.namespace, batch.hashes, batch.pages)
            _, lease = await client.lease(batch.namespace, batch.hashes, 10_000)
            assert lease is not None
            with await client.view(batch.namespace, batch.hashes, lease=lease) as views:
                return [bytes(page) for page in views.pages if page is not None]

    assert asyncio.run(view()) == make_batch(2, model="async view", layout=PAGE).pages


def test_a_node_without_shm_offers_no_views() -> None:
    with StoreProcess("--capacity", "4MiB", "--transports", "tcp") as node:
        with attnstore.connect(node.url) as client:
            batch = stored(client, 1, "no shm")
            lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
            assert lease is not None
            with pytest.raises(InvalidArgument, match="offers shm"):
                client.view(batch.namespace, batch.hashes, lease=lease)
        with attnstore.connect(node.url, transport="shm") as client:
            client.register_layout(batch.namespace, PAGE)
            with pytest.raises(InvalidArgument, match="does not offer"):
                client.read(batch.namespace, batch.hashes, batch.buffers())


def test_a_leased_page_survives_a_flood_and_a_page_whose_lease_ended_is_known_to_be_gone(small_node: StoreProcess) -> None:
    with attnstore.connect(small_node.url) as client:
        batch = stored(client, 4, "in place")
        lease = client.lease(batch.namespace, batch.hashes, 600_000)[1]
        assert lease is not None
        with client.view(batch.namespace, batch.hashes, lease=lease) as views:
            flood(client)
            assert views.verify() == (OK,) * 4
            assert [bytes(view) for view in views.pages if view is not None] == batch.pages
            client.release(lease)
            flood(client)
            assert views.verify() == (MISSING,) * 4
            assert not any(views.valid(index) for index in range(4))
            assert views.statuses == (OK,) * 4, "what it was is not rewritten"
            assert all(bytes(view) != page for view, page in zip(views.pages, batch.pages, strict=True) if view is not None)


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["whole pages", "a layer range"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_slot_recycled_around_the_copy_is_a_miss(
    small_node: StoreProcess, monkeypatch: pytest.MonkeyPatch, moment: str, layers: tuple[int, int] | None
) -> None:
    """The slot is recycled after the page was located: just before its bytes are copied, or just after."""
    copy = MappedExtent.copy

    with attnstore.connect(small_node.url, transport="shm") as client, attnstore.connect(small_node.url) as other:
        batch = stored(client, 1, f"around {moment}")

        def copy_amid_a_flood(extent: MappedExtent, begin: int, destination: memoryview, layer_bytes: int) -> Checksums:
            if moment == "before":
                flood(other)
            made = copy(extent, begin, destination, layer_bytes)
            if moment == "after":
                flood(other)
            return made

        monkeypatch.setattr(MappedExtent, "copy", copy_amid_a_flood)
        size_bytes = PAGE.page_bytes if layers is None else PAGE.layer_bytes
        answer = client.read(batch.namespace, batch.hashes, [bytearray(size_bytes)], layers=layers)
    assert (answer.statuses, answer.error) == ((MISSING,), None)


@pytest.mark.parametrize("at", [0, 64, 1024, PAGE.page_bytes // 2, PAGE.page_bytes - 1])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])
def test_a_byte_that_flips_in_the_nodes_memory_is_corrupt(
    node: StoreProcess, monkeypatch: pytest.MonkeyPatch, compiled: bool, at: int
) -> None:
    copying.prepare()
    if not compiled:
        monkeypatch.setattr(copying, "_compilation", copying._Compilation(1 << 60))
    with attnstore.connect(node.url, transport="shm") as client:
        batch = stored(client, 3, f"flips {compiled} {at}")
        with Peer.greeted(node) as peer:
            place = peer.locate(batch.namespace, batch.hashes[1])[0]
            assert isinstance(place, Place)
            extent = peer.map(place)
            assert extent is not None
        flip_byte_of(node, extent, place.offset_bytes + at)
        assert client.read(batch.namespace, batch.hashes, batch.buffers()).statuses == (OK, CORRUPT, OK)


def flip_byte_of(node: StoreProcess, extent: mmap.mmap, at: int) -> None:
    """Changes the node's own file of a mapped extent, which its user may open again."""
    before = extent[at]
    for number in os.listdir(f"/proc/{node.process.pid}/fd"):
        path = f"/proc/{node.process.pid}/fd/{number}"
        if "attnstore-extent" in os.readlink(path):
            with open(path, "r+b") as file:
                was = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes((before ^ 1,)), at)
                if extent[at] != before:
                    return
                os.pwrite(file.fileno(), was, at)
    raise AssertionError("the node has no such extent")


def test_readers_amid_a_churning_writer_get_right_bytes_or_misses(small_node: StoreProcess) -> None:
    batches = [make_batch(20, model=f"churn {number}", layout=PAGE) for number in range(4)]
    wrong: list[str] = []
    hits = [0]
    done = threading.Event()

    def read_on(number: int) -> None:
        batch = batches[number]
        with attnstore.connect(small_node.url, transport="shm") as client:
            client.register_layout(batch.namespace, PAGE)
            while not done.is_set():
                buffers = batch.buffers()
                statuses = client.read(batch.namespace, batch.hashes, buffers).statuses
                for status, buffer, page in zip(statuses, buffers, batch.pages, strict=True):
                    hits[0] += status is OK
                    if status not in (OK, MISSING) or (status is OK and buffer != page):
                        wrong.append(f"{status}")

    readers = [threading.Thread(target=read_on, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    with attnstore.connect(small_node.url, transport="tcp") as client:
        for turn in range(40):
            batch = batches[turn % 4]
            client.register_layout(batch.namespace, PAGE)
            client.write(batch.namespace, batch.hashes, batch.pages)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert hits[0] > 0


def test_a_killed_node_leaves_views_readable_and_reads_unanswered() -> None:
    with StoreProcess("--capacity", "4MiB") as node, attnstore.connect(node.url, transport="shm", deadline_ms=5_000) as client:
        batch = stored(client, 3, "killed")
        client.read(batch.namespace, batch.hashes, batch.buffers())
        lease = client.lease(batch.namespace, batch.hashes, 600_000)[1]
        assert lease is not None
        with client.view(batch.namespace, batch.hashes, lease=lease) as views:
            node.kill()
            assert [bytes(view) for view in views.pages if view is not None] == batch.pages
            assert views.verify() == (OK,) * 3, "nobody is left to recycle them"
        answer = client.read(batch.namespace, batch.hashes, batch.buffers())
        assert answer.statuses == (INCOMPLETE,) * 3
        assert isinstance(answer.error, Unavailable)
        with pytest.raises(Unavailable):
            client.view(batch.namespace, batch.hashes, lease=lease)


def test_a_restarted_node_is_another_memory_and_what_was_mapped_is_let_go() -> None:
    mapped_before = mapped_files()
    with StoreProcess("--capacity", "4MiB") as first:
        address = first.address
        with attnstore.connect(first.url, transport="shm") as client:
            batch = stored(client, 3, "restarted")
            assert client.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 3
            of_the_first = mapped_files() - mapped_before
            assert of_the_first
            first.kill()
            with StoreProcess("--capacity", "4MiB", "--listen", address):
                assert client.read(batch.namespace, batch.hashes, batch.buffers()).statuses == (MISSING,) * 3
                assert not mapped_files() & of_the_first
                client.write(batch.namespace, batch.hashes, batch.pages)
                buffers = batch.buffers()
                assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 3
                assert buffers == batch.pages
    assert not mapped_files() - mapped_before


def test_a_stopped_node_ends_a_read_at_its_deadline_and_serves_again_later(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = stored(client, 2, "stopped")
        client.read(batch.namespace, batch.hashes, batch.buffers())
        node.suspend()
        try:
            answer = client.read(batch.namespace, batch.hashes, batch.buffers(), deadline_ms=200)
        finally:
            node.resume()
        assert answer.statuses == (INCOMPLETE,) * 2
        assert isinstance(answer.error, DeadlineExceeded)
        assert client.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 2


def test_without_its_socket_auto_reads_over_the_next_transport_and_forced_shm_says_why() -> None:
    with StoreProcess("--capacity", "4MiB") as node:
        with attnstore.connect(node.url) as before, attnstore.connect(node.url, transport="shm") as forced:
            batch = stored(before, 2, "no socket")
            assert before.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 2
            address, _ = open_channel(node)
            Path(address).unlink()
            with attnstore.connect(node.url) as after:
                after.register_layout(batch.namespace, PAGE)
                buffers = batch.buffers()
                assert after.read(batch.namespace, batch.hashes, buffers).leading_hits == 2
                assert buffers == batch.pages
            assert before.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 2, "its connection lives"
            forced.register_layout(batch.namespace, PAGE)
            answer = forced.read(batch.namespace, batch.hashes, batch.buffers())
            assert isinstance(answer.error, Unavailable)
            assert "shared memory" in str(answer.error)
        assert node.stop() == 0, "a socket that somebody removed does not keep the node from stopping"


def test_what_a_killed_node_left_behind_is_removed_by_the_next_one_and_a_living_node_is_left_alone(tmp_path: Path) -> None:
    def directories() -> set[Path]:
        return set(tmp_path.iterdir())

    options, environment = ("--capacity", "4MiB"), {"XDG_RUNTIME_DIR": str(tmp_path)}
    killed = StoreProcess(*options, environment=environment)
    [left_behind] = directories()
    killed.kill()
    assert directories() == {left_behind}
    with StoreProcess(*options, environment=environment) as living:
        [socket_of_living] = directories() - {left_behind}
        for directory in (left_behind, socket_of_living):
            os.utime(directory, (0, 0))
        with StoreProcess(*options, environment=environment):
            assert left_behind not in directories()
            assert socket_of_living in directories()
            assert len(directories()) == 2
            batch = make_batch(1, model="left behind")
            with attnstore.connect(living.url, transport="shm") as client:
                client.register_layout(batch.namespace, batch.layout)
                client.write(batch.namespace, batch.hashes, batch.pages)
                assert client.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 1
    assert directories() == set()
