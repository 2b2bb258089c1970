"""Copies of pages: the runs that they are merged to, and the bytes that arrive, on tensors of the host.

The device's streams do not take part: a stream here does its work at once. `test_cuda.py` runs the same copies on a GPU.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from attnstore_worker.device import copies_staged
from attnstore_worker.device.base import Copies, Copy, Event, Wait
from attnstore_worker.device.copies_direct import DirectCopies, runs_of
from attnstore_worker.device.copies_staged import StagedCopies
from attnstore_worker.device.pages import anonymous_memory
from attnstore_worker.device.pinned import is_writable, pages_of

PAGE = (3, 2, 1, 4, 2)
SLOTS, BLOCKS = 12, 9


class Done:
    """An event of work that is done when it is submitted."""

    def done(self) -> bool:
        return True

    def wait(self, wait: Wait) -> None:
        pass


class Timed(Done):
    def elapsed_ms(self) -> float | None:
        return 0.0


class AtOnce:
    """A stream that does its work when it is submitted; it remembers what it waits for, and how often it had waited before each
    copy whose time is taken.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.waited_before: list[int] = []

    def record(self) -> Event:
        return Done()

    def wait(self, event: Event, wait: Wait) -> None:
        assert event.done()
        self.waits.append(wait)

    @contextmanager
    def submitting(self) -> Iterator[None]:
        yield

    def timed(self, submit: Callable[[], None]) -> Copy:
        self.waited_before.append(len(self.waits))
        submit()
        return Timed()


def scatter(pages: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    blocks[block_ids.long()] = pages


def gather(blocks: Tensor, block_ids: Tensor, pages: Tensor) -> Tensor:
    return pages.copy_(blocks[block_ids.long()])


def direct(blocks: Tensor, up: AtOnce, down: AtOnce) -> Copies:
    return DirectCopies(blocks, up, down)


def staged(blocks: Tensor, up: AtOnce, down: AtOnce) -> Copies:
    return StagedCopies(blocks, up, down, scatter, gather)


@pytest.fixture(params=[direct, staged])
def create(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, AtOnce, AtOnce], Copies]:
    """Copies of each kind; a buffer of the device holds four pages, fewer than most batches have."""
    page_bytes = 4 * torch.Size(PAGE).numel()
    monkeypatch.setattr(copies_staged, "STAGED_BYTES", 4 * page_bytes)
    return request.param


def numbered(count: int) -> Tensor:
    return torch.arange(count * torch.Size(PAGE).numel(), dtype=torch.float32).view(count, *PAGE)


@given(some.lists(some.tuples(some.integers(0, 30), some.integers(0, 30)), max_size=20))
def test_runs_copy_exactly_the_pairs_in_their_order(pairs: list[tuple[int, int]]) -> None:
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    copied = [(run.source + at, run.target + at) for run in runs_of(sources, targets) for at in range(run.count)]
    assert copied == pairs


def test_neighbours_on_both_sides_are_one_run() -> None:
    runs = list(runs_of([3, 4, 5, 6, 9], [10, 11, 12, 20, 21]))
    assert [(run.source, run.target, run.count) for run in runs] == [(3, 10, 3), (6, 20, 1), (9, 21, 1)]
    assert list(runs_of([], [])) == []


def test_pages_arrive_in_their_blocks_and_nowhere_else(create: Callable[..., Copies]) -> None:
    host, blocks = numbered(SLOTS), torch.full((BLOCKS, *PAGE), -1.0)
    slots, block_ids = [2, 3, 4, 9, 0, 1], [5, 6, 7, 0, 2, 1]
    create(blocks, AtOnce(), AtOnce()).up(host, slots, block_ids)
    for slot, block_id in zip(slots, block_ids, strict=True):
        assert torch.equal(blocks[block_id], host[slot])
    untouched = [block_id for block_id in range(BLOCKS) if block_id not in block_ids]
    assert torch.all(blocks[untouched] == -1)
    assert torch.equal(host, numbered(SLOTS))


def test_blocks_arrive_in_their_slots_and_nowhere_else(create: Callable[..., Copies]) -> None:
    host, blocks = torch.full((SLOTS, *PAGE), -1.0), numbered(BLOCKS)
    slots, block_ids = [11, 4, 5, 6, 7, 8], [8, 0, 1, 2, 3, 5]
    create(blocks, AtOnce(), AtOnce()).down(block_ids, host, slots)
    for slot, block_id in zip(slots, block_ids, strict=True):
        assert torch.equal(host[slot], blocks[block_id])
    untouched = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.all(host[untouched] == -1)
    assert torch.equal(blocks, numbered(BLOCKS))


def test_only_the_named_layers_arrive(create: Callable[..., Copies]) -> None:
    host, blocks = numbered(SLOTS), torch.full((BLOCKS, *PAGE), -1.0)
    create(blocks, AtOnce(), AtOnce()).up(host, [1, 2, 7], [3, 4, 0], layers=range(1, 3))
    for slot, block_id in ((1, 3), (2, 4), (7, 0)):
        assert torch.equal(blocks[block_id, 1:3], host[slot, 1:3])
        assert torch.all(blocks[block_id, 0] == -1)


def test_a_copy_waits_for_each_of_its_events_on_its_own_stream(create: Callable[..., Copies]) -> None:
    up, down = AtOnce(), AtOnce()
    copies = create(numbered(BLOCKS), up, down)
    copies.up(numbered(SLOTS), [0], [0], after=[(Wait.UP_AFTER_COMPUTE, Done()), (Wait.UP_AFTER_DOWN, Done())])
    copies.down([0], numbered(SLOTS), [0], after=[(Wait.DOWN_AFTER_COMPUTE, Done())])
    assert up.waits == [Wait.UP_AFTER_COMPUTE, Wait.UP_AFTER_DOWN]
    assert up.waited_before == [2], "what a copy waits for is no part of its time"
    assert down.waits == [Wait.DOWN_AFTER_COMPUTE]


@pytest.mark.parametrize(
    ("slots", "block_ids"), [([SLOTS], [0]), ([-1], [0]), ([0], [BLOCKS]), ([0], [-1]), ([0, 1], [0]), ([0, SLOTS], [0, 1])]
)
def test_an_index_out_of_range_copies_nothing(create: Callable[..., Copies], slots: list[int], block_ids: list[int]) -> None:
    host, blocks = numbered(SLOTS), torch.full((BLOCKS, *PAGE), -1.0)
    copies = create(blocks, AtOnce(), AtOnce())
    with pytest.raises(IndexError, match="are given"):
        copies.up(host, slots, block_ids)
    with pytest.raises(IndexError, match="are given"):
        copies.down(block_ids, host, slots)
    assert torch.all(blocks == -1)
    assert torch.equal(host, numbered(SLOTS))


def test_the_registered_pages_of_the_system_contain_the_tensor() -> None:
    memory = anonymous_memory(8 * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = whole.data_ptr()
    assert pages_of(whole) == (begin, begin + 8 * mmap.PAGESIZE)
    part = whole[mmap.PAGESIZE - 1 : 2 * mmap.PAGESIZE + 1]
    assert pages_of(part) == (begin, begin + 3 * mmap.PAGESIZE)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_memory_that_is_mapped_read_only_is_known_as_such() -> None:
    writable = torch.frombuffer(anonymous_memory(4 * mmap.PAGESIZE), dtype=torch.uint8)
    read_only = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    assert is_writable(*pages_of(writable))
    assert not is_writable(*pages_of(torch.frombuffer(read_only, dtype=torch.uint8)))
