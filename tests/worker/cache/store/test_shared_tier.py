"""Pages used in place from a real node's memory: the window's pages are the node's bytes, and recycled pages are detected."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnstore
from attnstore.attention import create_attention
from attnstore.core.layout import DType, PageLayout
from attnstore.testing import StoreProcess
from attnstore.types import Lease, PageStatus
from attnstore_worker.cache.pool.page_window import PageWindow
from attnstore_worker.cache.store.shared_tier import SharedPages, SharedTier
from tests.memory_files import flip_bit
from tests.samples import Batch, eventually, make_batch

LAYOUT = PageLayout(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=DType.FP32)
"""32 KiB per page."""
DEADLINE_MS = 10_000
LEASE_MS = 60_000


@pytest.fixture
def node() -> Iterator[StoreProcess]:
    """Room for 128 pages."""
    with StoreProcess("--capacity", "4MiB") as node:
        yield node


@pytest.fixture
def client(node: StoreProcess) -> Iterator[attnstore.Client]:
    with attnstore.connect(node.url) as client:
        yield client


def stored(client: attnstore.Client, pages: int, model: str, layout: PageLayout = LAYOUT) -> Batch:
    batch = make_batch(pages, model=model, layout=layout)
    client.register_layout(batch.namespace, layout)
    assert all(verdict.is_kept for verdict in client.write(batch.namespace, batch.hashes, batch.pages).verdicts)
    return batch


def leased(client: attnstore.Client, batch: Batch) -> Lease:
    lease = client.lease(batch.namespace, batch.hashes, LEASE_MS)[1]
    assert lease is not None
    return lease


def tier_on(client: attnstore.Client, batch: Batch, window: PageWindow) -> SharedTier:
    return SharedTier(client, batch.namespace, window, batch.layout.page_bytes, deadline_ms=DEADLINE_MS)


def bytes_of(window: PageWindow, block_id: int) -> bytes:
    return window.tensor[block_id].view(torch.uint8).numpy().tobytes()


def flood(client: attnstore.Client) -> None:
    """Recycles every unleased slot."""
    stored(client, 256, f"flood {os.urandom(8).hex()}")


def borrowed(tier: SharedTier, client: attnstore.Client, batch: Batch) -> SharedPages:
    pages = tier.borrow(batch.hashes, leased(client, batch))
    assert pages is not None
    assert pages.intact()
    return pages


def test_borrowed_pages_are_the_nodes_bytes_beside_the_own_pool(client: attnstore.Client) -> None:
    batch = stored(client, 40, "in place")
    window = PageWindow(LAYOUT)
    own = window.pool(8 * LAYOUT.page_bytes)
    own.tensor[:] = 1.5
    tier = tier_on(client, batch, window)
    pages = borrowed(tier, client, batch)
    assert [bytes_of(window, block_id) for block_id in pages.block_ids] == batch.pages
    assert min(pages.block_ids) >= own.capacity
    assert bool((window.tensor[:8] == 1.5).all())
    pages.release()
    assert eventually(lambda: client.stats().leases == 0)
    tier.close()


def test_attention_over_own_and_borrowed_pages_is_one_call_and_equal_to_attention_over_copies(client: attnstore.Client) -> None:
    generator = torch.Generator().manual_seed(3)
    contents = torch.randn(12, *LAYOUT.shape, generator=generator)
    batch = make_batch(12, model="attended", layout=LAYOUT)
    client.register_layout(batch.namespace, LAYOUT)
    client.write(batch.namespace, batch.hashes[:8], [page.numpy().tobytes() for page in contents[:8]])
    batch.hashes[8:] = []
    window = PageWindow(LAYOUT)
    own = window.pool(6 * LAYOUT.page_bytes)
    tier = tier_on(client, batch, window)
    pages = borrowed(tier, client, batch)
    own.tensor[2:6] = contents[8:]
    block_tables = torch.tensor([[*pages.block_ids, 2, 3, 4, 5]], dtype=torch.int32)
    query = torch.randn(100, 4, LAYOUT.head_dim, generator=generator)
    for rows in (1, 100):
        lengths = torch.tensor([190], dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32)
        for backend in (create_attention("cpu"), create_attention("reference")):
            attended = backend.paged_attention(query[:rows], window.tensor, block_tables, *lengths, layer=1, scale=0.125)
            in_order = torch.arange(12, dtype=torch.int32).unsqueeze(0)
            expected = backend.paged_attention(query[:rows], contents, in_order, *lengths, layer=1, scale=0.125)
            assert torch.equal(attended[0], expected[0])
            assert torch.equal(attended[1], expected[1])
    tier.close()


def test_a_lease_keeps_pages_in_place_and_what_is_recycled_after_it_is_known(client: attnstore.Client) -> None:
    batch = stored(client, 10, "recycled")
    window = PageWindow(LAYOUT)
    tier = tier_on(client, batch, window)
    pages = borrowed(tier, client, batch)
    flood(client)
    assert pages.intact()
    assert [bytes_of(window, block_id) for block_id in pages.block_ids] == batch.pages
    client.release(pages.lease.lease)
    flood(client)
    assert not pages.intact()
    tier.close()


def test_one_recycled_page_of_many_is_noticed(client: attnstore.Client) -> None:
    batch = stored(client, 10, "one of many")
    tier = tier_on(client, batch, PageWindow(LAYOUT))
    pages = borrowed(tier, client, batch)
    client.release(pages.lease.lease)
    assert client.delete(batch.namespace, batch.hashes[6:7]) == (PageStatus.OK,)
    assert pages.intact(), "its bytes are still there"
    stored(client, 1, "in its place")
    flood(client)
    assert not pages.intact()
    tier.close()


def test_a_lost_lease_ends_the_trust_in_pages_that_are_still_there(client: attnstore.Client) -> None:
    batch = stored(client, 2, "lost lease")
    tier = tier_on(client, batch, PageWindow(LAYOUT))
    pages = borrowed(tier, client, batch)
    pages.lease.lost = True
    assert not pages.intact()
    tier.close()


def test_a_node_that_dies_leaves_the_pages_readable(node: StoreProcess, client: attnstore.Client) -> None:
    batch = stored(client, 10, "dies")
    window = PageWindow(LAYOUT)
    tier = tier_on(client, batch, window)
    pages = borrowed(tier, client, batch)
    node.kill()
    assert pages.intact()
    assert [bytes_of(window, block_id) for block_id in pages.block_ids] == batch.pages
    assert tier.borrow(batch.hashes, pages.lease.lease) is None
    pages.release()
    tier.close()


def test_what_is_not_all_there_or_not_leased_is_not_borrowed(client: attnstore.Client) -> None:
    batch = stored(client, 4, "not all")
    tier = tier_on(client, batch, PageWindow(LAYOUT))
    lease = leased(client, batch)
    assert tier.borrow([*batch.hashes, attnstore.BlockHash(b"?" * 32)], lease) is None
    client.release(lease)
    assert tier.borrow(batch.hashes, lease) is None
    tier.close()


def test_a_page_that_has_changed_is_not_borrowed_and_one_that_is_found_later_is_withdrawn() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        arena = Path(folder) / "arena"
        with (
            StoreProcess("--capacity", "4MiB", "--arena-path", str(arena), "--scrub-rate", "0") as node,
            attnstore.connect(node.url, shared_path=arena) as client,
            attnstore.connect(node.url, transport="tcp") as other,
        ):
            batch = stored(client, 3, "changed")
            tier = tier_on(client, batch, PageWindow(LAYOUT))
            flip_bit(arena, batch.pages[1], 0)
            lease = leased(client, batch)
            assert tier.borrow(batch.hashes, lease) is None
            client.release(lease)
            assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts[1] is PageStatus.STORED
            pages = borrowed(tier, client, batch)
            assert pages.intact()
            flip_bit(arena, batch.pages[2], 0)
            other.register_layout(batch.namespace, LAYOUT)
            assert other.read(batch.namespace, batch.hashes, batch.buffers()).statuses[2] is PageStatus.CORRUPT
            assert not pages.intact()
            tier.close()


def test_a_node_without_shared_memory_lends_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with StoreProcess("--capacity", "4MiB", "--transports", "tcp") as node, attnstore.connect(node.url) as client:
        batch = stored(client, 2, "no shm")
        tier = tier_on(client, batch, PageWindow(LAYOUT))
        for _ in range(3):
            assert tier.borrow(batch.hashes, leased(client, batch)) is None
        tier.close()
    assert sum("cannot be used in place" in record.message for record in caplog.records) == 1


def test_pages_off_the_windows_grid_are_not_borrowed(client: attnstore.Client) -> None:
    """The node rounds slots of 4,104 bytes up to 4,160, so only the first one is aligned to a page of the window."""
    layout = PageLayout(layers=1, kv_heads=1, head_dim=19, block_tokens=27, dtype=DType.FP32)
    assert layout.page_bytes == 4104
    batch = stored(client, 3, "off the grid", layout)
    tier = tier_on(client, batch, PageWindow(layout))
    assert tier.borrow(batch.hashes, leased(client, batch)) is None
    tier.close()


def mappings() -> int:
    """Returns how often this process maps an extent of a node."""
    return sum("attnstore-extent" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_an_extent_stays_in_the_window_as_long_as_somebody_uses_it_and_its_place_is_reused() -> None:
    window = PageWindow(LAYOUT)
    places = set()
    gc.collect()
    before = mappings()
    for _ in range(3):
        with StoreProcess("--capacity", "4MiB") as node, attnstore.connect(node.url) as client:
            batch = stored(client, 5, "reuse")
            tier = tier_on(client, batch, window)
            pages: SharedPages | None = borrowed(tier, client, batch)
            assert pages is not None
            places.add(min(pages.block_ids) // (4096 * 1024 // LAYOUT.page_bytes))
            assert mappings() == before + 2, "the client's and the window's"
            tier.close()
        assert [bytes_of(window, block_id) for block_id in pages.block_ids] == batch.pages, "the client is closed, the page held"
        pages = None
        gc.collect()
        assert mappings() == before
    assert len(places) == 1


def test_a_process_that_may_not_have_the_addresses_is_told_what_to_do() -> None:
    code = """
import resource
from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.pool.page_window import PageWindow
resource.setrlimit(resource.RLIMIT_AS, (1 << 38, 1 << 38))
try:
    PageWindow(PageLayout(layers=1, kv_heads=1, head_dim=16))
except InvalidArgument as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "ulimit -v" in told
    assert "copy pages instead" in told
