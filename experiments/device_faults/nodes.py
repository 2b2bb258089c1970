"""A store node that lends its memory to a device, and writes each page as soon as it may.

Owns: `SCENARIOS`, and the store. Invariant: as in `caches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import torch

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import block_hashes
from attnstore.types import Lease
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.cache.store.transfer import TransferObserver
from attnstore_worker.device.base import Wait
from attnstore_worker.device.pages import PagePool
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.testing import MemoryStore
from experiments.device_faults.worker import LAYOUT, NAMESPACE, WAIT_MS, content, prompt_of

TOKENS: Final = prompt_of(1)
NAMES: Final = block_hashes(NAMESPACE, TOKENS, LAYOUT.block_tokens)
LEASE: Final = Lease(b"l" * 16, WAIT_MS)


class Extent:
    """The memory of a node that writes a page right after its stamp was checked. The stamps of `recycled` pages have changed."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.pages = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
        self.address = self.pages.tensor.data_ptr()
        self.size_bytes = self.pages.tensor.nbytes
        self.recycled: set[int] = set()

    def holds(self, place: Any) -> bool:
        slot = place.offset_bytes // LAYOUT.page_bytes
        assert self._device.accesses is not None
        self.pages.tensor[slot] = 7.0
        self._device.accesses.host(self.pages.tensor, [slot], writes=True)
        return slot not in self.recycled


class Lends:
    """A store that lends the pages of a prompt, in the second half of an extent."""

    def __init__(self, device: SimulatedDevice, *, offset_bytes: int = 0, error: Exception | None = None) -> None:
        self.extent = Extent(device)
        self.offset_bytes = offset_bytes
        self.error = error
        self.asked = 0
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
    """Pages of `store` copied to blocks 0 to 3. `observer` is told of the reads."""

    def __init__(
        self,
        store: Lends,
        device: SimulatedDevice,
        wanted: Callable[[], bool] = lambda: True,
        observer: TransferObserver | None = None,
    ) -> None:
        remote = RemoteTier(MemoryStore(), NAMESPACE, LAYOUT, deadline_ms=WAIT_MS, clock=MonotonicClock(), observer=observer)
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


def checks_stamps_after_copies(device: SimulatedDevice) -> None:
    assert Copied(Lends(device), device).right() == [True] * 4


def cancels_a_copy_of_lent_pages(device: SimulatedDevice) -> None:
    """A load that is over gives its blocks back, and a step writes them."""
    copied = Copied(Lends(device), device, lambda: False)
    assert device.accesses is not None
    device.accesses.step((), range(4))
    assert copied.right() == [True] * 4


SCENARIOS: Final[dict[Wait, Callable[[SimulatedDevice], None]]] = {
    Wait.STAMPS_AFTER_UP: checks_stamps_after_copies,
    Wait.SHARED_RELEASED_AFTER_UP: cancels_a_copy_of_lent_pages,
}
