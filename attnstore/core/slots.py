"""Slots: the fixed capacity, divided into extents, divided into slots.

Owns: which slot is taken, which extent belongs to which class, and the numbers (`generation`, `tenancy`) by which the holder of an
old `Slot` detects that it was reused.
Invariants: `taken + free == slots_per_extent` in every extent that has an owner; an extent has an owner exactly while one of its
slots is taken; two taken slots never overlap; nothing is allocated beyond the capacity given at start.

A class is (tenant, page size). An extent serves one class at a time. An extent that is shared as memory therefore shows the pages
of one tenant only, and pages of many sizes share one capacity without fragmenting it (the slab allocator of Bonwick, 1994). An
extent whose last slot is given back returns to the pool, from which any class may take it.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from attnstore.errors import InvalidArgument
from attnstore.limits import EXTENT_BYTES_MAX, EXTENT_BYTES_MIN, EXTENTS_MIN

_ALIGNMENTS_BYTES = (4096, 64)
_ALIGNMENT_LOSS_DIVISOR = 64


def extent_bytes_for(capacity_bytes: int) -> int:
    """Returns the default extent size for an arena of `capacity_bytes`.

    At most `EXTENT_BYTES_MAX`. Small enough for `EXTENTS_MIN` extents, because every class in use holds at least one, but not below
    `EXTENT_BYTES_MIN`. A capacity smaller than two such extents is one extent.
    """
    extents = max(-(-capacity_bytes // EXTENT_BYTES_MAX), min(EXTENTS_MIN, capacity_bytes // EXTENT_BYTES_MIN), 1)
    exact = capacity_bytes // extents
    aligned = exact - exact % _ALIGNMENTS_BYTES[0]
    return exact if extents == 1 else aligned


class Slot(NamedTuple):
    """The place of a page: bytes `[offset_bytes, offset_bytes + size_bytes)` of an extent.

    `generation` is unique for every time a slot is taken, so an equal generation means that the bytes are those of the same page.
    `tenancy` counts the tenants that the extent has had: an arena wipes the extent when it sees the number rise.
    """

    extent: int
    offset_bytes: int
    size_bytes: int
    generation: int
    tenancy: int


class SlotClass:
    """The slots of one tenant and page size. Made by `SlotPool.slot_class`; only the pool changes it."""

    __slots__ = ("_open", "page_bytes", "slots_per_extent", "stride_bytes", "tenant")

    def __init__(self, tenant: str, page_bytes: int, extent_bytes: int) -> None:
        self.tenant = tenant
        self.page_bytes = page_bytes
        self.stride_bytes = _stride_bytes(page_bytes, extent_bytes)
        self.slots_per_extent = extent_bytes // self.stride_bytes
        self._open: dict[_Extent, None] = {}


class _Extent:
    __slots__ = ("free_offsets", "index", "owner", "taken", "tenancy", "tenant", "untouched_offset_bytes")

    def __init__(self, index: int) -> None:
        self.index = index
        self.owner: SlotClass | None = None
        self.tenant: str | None = None  # tenant of the last owner; kept after the ownership ends
        self.tenancy = 0
        self.taken = 0
        self.free_offsets: list[int] = []  # given back; this owner never took offsets from `untouched_offset_bytes` on
        self.untouched_offset_bytes = 0


class SlotPool:
    """Takes and gives back slots in O(1). Knows nothing of pages.

    Raises `InvalidArgument` if capacity and extent size give no extent.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        if capacity_bytes < 1:
            raise InvalidArgument(f"capacity_bytes is {capacity_bytes}; it must be at least 1")
        if not 1 <= extent_bytes <= capacity_bytes:
            raise InvalidArgument(f"extent_bytes is {extent_bytes}; it must be between 1 and capacity_bytes = {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.extent_bytes = extent_bytes
        self.extents = capacity_bytes // extent_bytes
        self._all = [_Extent(index) for index in range(self.extents)]
        self._never_used = list(reversed(self._all))
        self._given_back: dict[str, list[_Extent]] = {}  # by the tenant whose bytes they hold; no list is empty
        self._classes: dict[tuple[str, int], SlotClass] = {}
        self._generations = count(1)

    def slot_class(self, tenant: str, page_bytes: int) -> SlotClass:
        """Returns the class of a tenant and page size, created on first use. Raises `InvalidArgument` for a page larger than an
        extent.
        """
        if page_bytes > self.extent_bytes:
            raise InvalidArgument(
                f"a page of this layout has {page_bytes} bytes and must fit into one extent, but the arena of "
                f"{self.capacity_bytes} bytes is cut into extents of {self.extent_bytes} bytes; "
                "raise the capacity or the extent size, or use fewer block_tokens"
            )
        key = (tenant, page_bytes)
        if key not in self._classes:
            self._classes[key] = SlotClass(tenant, page_bytes, self.extent_bytes)
        return self._classes[key]

    def forget_class(self, slot_class: SlotClass) -> None:
        """Forgets a class without slots; a later class of its tenant and page size is a new one."""
        assert not slot_class._open, "a slot of the class is taken"
        del self._classes[slot_class.tenant, slot_class.page_bytes]

    def take(self, slot_class: SlotClass) -> Slot | None:
        """Returns a slot of an extent of the class, else of an extent from the pool, or None if there is neither."""
        extent = next(iter(slot_class._open), None) or self._acquire(slot_class)
        if extent is None:
            return None
        if extent.free_offsets:
            offset_bytes = extent.free_offsets.pop()
        else:
            offset_bytes = extent.untouched_offset_bytes
            extent.untouched_offset_bytes += slot_class.stride_bytes
        extent.taken += 1
        if extent.taken == slot_class.slots_per_extent:
            del slot_class._open[extent]
        return Slot(extent.index, offset_bytes, slot_class.page_bytes, next(self._generations), extent.tenancy)

    def give_back(self, slot: Slot) -> None:
        """Gives back a taken slot; with its last slot, the extent returns to the pool."""
        extent = self._all[slot.extent]
        slot_class = extent.owner
        assert slot_class is not None, "the slot is not taken"
        assert extent.tenancy == slot.tenancy, "the slot belongs to another tenant"
        extent.taken -= 1
        extent.free_offsets.append(slot.offset_bytes)
        if extent.taken == 0:
            self._surrender(extent, slot_class)
        else:
            slot_class._open[extent] = None

    def check(self, taken: list[Slot]) -> None:
        """Asserts the module's invariants, given all slots that the caller has taken. O(slots); for tests."""
        by_extent: dict[int, list[Slot]] = {}
        for slot in taken:
            by_extent.setdefault(slot.extent, []).append(slot)
        for extent in self._all:
            slots = by_extent.get(extent.index, [])
            assert len(slots) == extent.taken, f"extent {extent.index}: {extent.taken} slots taken, {len(slots)} in use"
            assert (extent.owner is not None) == bool(slots), f"extent {extent.index}: owner and slots disagree"
            if extent.owner is None:
                continue
            untouched = extent.owner.slots_per_extent - extent.untouched_offset_bytes // extent.owner.stride_bytes
            assert extent.taken + len(extent.free_offsets) + untouched == extent.owner.slots_per_extent
            assert (extent in extent.owner._open) == (extent.taken < extent.owner.slots_per_extent)
            offsets = [slot.offset_bytes for slot in slots] + extent.free_offsets
            assert len(set(offsets)) == len(offsets), f"extent {extent.index}: two slots at one offset"
            for slot in slots:
                assert slot.offset_bytes % extent.owner.stride_bytes == 0
                assert slot.size_bytes == extent.owner.page_bytes
                assert slot.tenancy == extent.tenancy
                assert slot.offset_bytes + slot.size_bytes <= self.extent_bytes
        pooled = len(self._never_used) + sum(map(len, self._given_back.values()))
        assert pooled == sum(extent.owner is None for extent in self._all)
        assert self.extents * self.extent_bytes <= self.capacity_bytes
        generations = [slot.generation for slot in taken]
        assert len(set(generations)) == len(generations), "two taken slots share a generation"

    def _acquire(self, slot_class: SlotClass) -> _Extent | None:
        """Prefers extents that held this tenant's bytes and takes those of another tenant last, because they have to be wiped."""
        if slot_class.tenant in self._given_back:
            extent = self._pop_given_back(slot_class.tenant)
        elif self._never_used:
            extent = self._never_used.pop()
        elif self._given_back:
            extent = self._pop_given_back(next(iter(self._given_back)))
        else:
            return None
        if extent.tenant != slot_class.tenant:
            extent.tenant = slot_class.tenant
            extent.tenancy += 1
        extent.owner = slot_class
        slot_class._open[extent] = None
        return extent

    def _pop_given_back(self, tenant: str) -> _Extent:
        extents = self._given_back[tenant]
        extent = extents.pop()
        if not extents:
            del self._given_back[tenant]
        return extent

    def _surrender(self, extent: _Extent, slot_class: SlotClass) -> None:
        slot_class._open.pop(extent, None)  # an extent with a single slot was full, so it was not open
        extent.owner = None
        extent.free_offsets.clear()
        extent.untouched_offset_bytes = 0
        self._given_back.setdefault(slot_class.tenant, []).append(extent)


def _stride_bytes(page_bytes: int, extent_bytes: int) -> int:
    """Returns the page size rounded up to the largest alignment that costs less than 1/64 of the slots: none if there are fewer
    than 64.
    """
    slots = extent_bytes // page_bytes
    for alignment_bytes in _ALIGNMENTS_BYTES:
        stride_bytes = -(-page_bytes // alignment_bytes) * alignment_bytes
        if slots - extent_bytes // stride_bytes <= slots // _ALIGNMENT_LOSS_DIVISOR:
            return stride_bytes
    return page_bytes
