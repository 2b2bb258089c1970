"""Copies from a node's memory: a page counts if its stamp is unchanged after its copy; a cancelled load ends after its copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.worker.cache.on_device import LAYOUT, NAMESPACE, WAIT_MS, content, prompt_of
from torch import Tensor

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import block_hashes
from attnstore.errors import DeadlineExceeded, InvalidArgument
from attnstore.types import Lease, PageStatus
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.device.base import Wait
from attnstore_worker.device.pages import PagePool
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.testing import MemoryStore

TOKENS = prompt_of(1)
NAMES = block_hashes(NAMESPACE, TOKENS, LAYOUT.block_tokens)
LEASE = Lease(b"l" * 16, WAIT_MS)


class Extent:
    """The memory of a node that writes a page right after its stamp was checked, or before that if it is `recycled`."""

    def __init__(self) -> None:
        self.pages = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
        self.address = self.pages.tensor.data_ptr()
        self.size_bytes = self.pages.tensor.nbytes
        self.recycled: set[int] = set()

    def holds(self, place: Any) -> bool:
        slot = place.offset_bytes // LAYOUT.page_bytes
        self.pages.tensor[slot] = 7.0
        return slot not in self.recycled


@dataclass
class Lends:
    """A store that lends the pages of a prompt in the second half of an extent."""

    extent: Extent = field(default_factory=Extent)
    offset_bytes: int = 0
    error: Exception | None = None
    asked: int = 0

    def __post_init__(self) -> None:
        for index in range(4):
            self.extent.pages.page(4 + index)[:] = content(TOKENS, index)

    def view(self, namespace: bytes, hashes: Sequence[bytes], /, *, lease: Lease, deadline_ms: float) -> Any:
        del namespace, lease, deadline_ms
        self.asked += 1
        if self.error is not None:
            raise self.error
        at = [(4 + index) * LAYOUT.page_bytes + self.offset_bytes for index in range(len(hashes))]
        places = [SimpleNamespace(offset_bytes=offset, size_bytes=LAYOUT.page_bytes) for offset in at]
        return SimpleNamespace(located=[(place, self.extent) for place in places])

    def renew(self, lease: Lease, lease_ms: int, /) -> None:
        """No-op."""

    def release(self, lease: Lease, /) -> None:
        """No-op."""


class Copied:
    """Pages of `store` copied to blocks 0 to 3."""

    def __init__(self, store: Lends, device: SimulatedDevice, wanted: Callable[[], bool] = lambda: True) -> None:
        remote = RemoteTier(MemoryStore(), NAMESPACE, LAYOUT, deadline_ms=WAIT_MS, clock=MonotonicClock())
        self.device = device
        self.blocks = DeviceBlocks(device, LAYOUT, 8 * LAYOUT.page_bytes)
        self.copies = SharedCopies(store, NAMESPACE, self.blocks, remote)
        self.read(wanted)

    def read(self, wanted: Callable[[], bool] = lambda: True) -> None:
        after = self.blocks.overwriting(range(4))
        self.result = self.copies.read(NAMES, range(4), LEASE, deadline_ms=WAIT_MS, after=after, is_wanted=wanted)

    def right(self) -> list[bool]:
        pages = [self.blocks.tensor[index].view(torch.uint8).numpy().tobytes() for index in range(4)]
        return [page == content(TOKENS, index) for index, page in enumerate(pages)]


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_stamps_are_checked_after_the_copies_have_ended(schedule: Schedule) -> None:
    store = Lends()
    store.extent.recycled = {6}
    copied = Copied(store, SimulatedDevice(schedule))
    assert copied.result is not None
    assert copied.result.statuses == (PageStatus.OK, PageStatus.OK, PageStatus.MISSING, PageStatus.OK)
    assert copied.right() == [True] * 4, "a node writes a page only after its stamp was checked"
    assert (copied.result.bytes_read, copied.result.transport) == (3 * LAYOUT.page_bytes, "shm")


def test_stamps_that_are_checked_before_the_copies_have_ended_show_as_wrong_bytes() -> None:
    assert Copied(Lends(), SimulatedDevice("late", without=Wait.STAMPS_AFTER_UP)).right() == [False] * 4


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_load_that_is_over_keeps_its_lease_and_its_blocks_until_the_copies_have_ended(schedule: Schedule) -> None:
    copied = Copied(Lends(), SimulatedDevice(schedule), lambda: False)
    assert copied.result is not None
    assert set(copied.result.statuses) == {PageStatus.INCOMPLETE}
    accesses = copied.device.accesses
    assert accesses is not None
    accesses.step((), range(4))
    assert copied.right() == [True] * 4


def test_a_lease_that_ends_before_the_copies_is_noticed() -> None:
    copied = Copied(Lends(), SimulatedDevice("late", without=Wait.SHARED_RELEASED_AFTER_UP), lambda: False)
    assert copied.right() == [False] * 4
    accesses = copied.device.accesses
    assert accesses is not None
    with pytest.raises(Unsynchronised):
        accesses.step((), range(4))


def test_pages_that_are_not_aligned_or_not_registered_go_through_staging() -> None:
    assert Copied(Lends(offset_bytes=16), SimulatedDevice()).result is None

    class Refusing(SimulatedDevice):
        def register(self, host: Tensor) -> bool:
            del host
            return False

    assert Copied(Lends(), Refusing()).result is None


def test_a_store_on_another_host_is_asked_once_and_one_that_is_late_again() -> None:
    for error, asked in ((InvalidArgument("not on this host"), 1), (DeadlineExceeded("late"), 2)):
        store = Lends(error=error)
        copied = Copied(store, SimulatedDevice())
        copied.read()
        assert (copied.result, store.asked) == (None, asked)
