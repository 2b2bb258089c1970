"""Slots for arriving pages, and the pages that are evicted to free them.

Owns: the eviction order of every slot class, and the count of evictions. Invariants: only unpinned pages are evicted; memory of
another class is taken one idle extent at a time, and only if that extent was used less recently than the class's own pages; a
tenant at its quota evicts as much as it takes; a tenant at its share of busy extents gets slots in those extents only.

No command evicts more than `WORK_PAGES_MAX` pages. A command that needs more returns `Room.MAKING` and is called again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.page import NamespaceRecord, Page
from attnstore.core.pins import Pins
from attnstore.core.quota import Quotas
from attnstore.core.residency import Residency
from attnstore.core.slots import Slot, SlotClass, SlotPool
from attnstore.limits import WORK_PAGES_MAX


class Room(enum.Enum):
    """Whether there is room for one more page: FREE now, MAKING after more calls, or NONE while too many pages are pinned."""

    FREE = enum.auto()
    MAKING = enum.auto()
    NONE = enum.auto()


class RoomMaker:
    """Finds slots for one page table. `policy` creates the eviction order of a class, `drop` ends the life of an unpinned page."""

    def __init__(
        self,
        slots: SlotPool,
        residency: Residency,
        quotas: Quotas,
        pins: Pins,
        policy: Callable[[], EvictionPolicy[Page]],
        drop: Callable[[Page], None],
    ) -> None:
        self._slots = slots
        self._residency = residency
        self._quotas = quotas
        self._pins = pins
        self._new_policy = policy
        self._drop = drop
        self._policies: dict[SlotClass, EvictionPolicy[Page]] = {}
        self.evicted_pages = 0
        """Pages evicted since the start."""

    def policy_of(self, slot_class: SlotClass) -> EvictionPolicy[Page]:
        """Returns the eviction order of a class, created on first use."""
        return self._policies.setdefault(slot_class, self._new_policy())

    def forget(self, slot_class: SlotClass) -> None:
        """Forgets a class that has no namespace any more."""
        del self._policies[slot_class]
        self._slots.forget_class(slot_class)

    def free_slot(self, record: NamespaceRecord) -> Slot | Literal[Room.NONE]:
        """Returns a free slot without evicting anything."""
        if not self._quotas.leaves_room(record.space.tenant, record.layout.page_bytes):
            return Room.NONE
        slot = self._slots.take(record.slot_class)
        if slot is None:
            return Room.NONE
        if not self._residency.extent_of(slot).busy and not self._residency.may_busy(record.space.tenant):
            self._slots.give_back(slot)
            return Room.NONE
        return slot

    def slot_for(self, record: NamespaceRecord, now_ms: float) -> Slot | Literal[Room.MAKING, Room.NONE]:
        """Returns a free slot, evicting if needed. A tenant at its share of busy extents gets a slot in one of those or none."""
        if not self._quotas.leaves_room(record.space.tenant, record.layout.page_bytes):
            room = self._make_quota(record, now_ms)
            if room is not Room.FREE:
                return room
        if not self._residency.may_busy(record.space.tenant):
            later = self._later(now_ms)
            if not self._residency.may_busy(record.space.tenant):
                return self._slot_in_busy_extent(record) or later
        return self._slots.take(record.slot_class) or self._make_room(record, now_ms)

    def _slot_in_busy_extent(self, record: NamespaceRecord) -> Slot | None:
        slot = self._slots.take(record.slot_class)
        if slot is None:
            victim = record.policy.victim()
            if victim is None or not victim.extent.busy:
                return None
            self._evict(victim)
            return self._slots.take(record.slot_class)
        if not self._residency.extent_of(slot).busy:
            self._slots.give_back(slot)
            return None
        return slot

    def trim(self) -> bool:
        """Evicts up to `WORK_PAGES_MAX` pages of tenants that exceed their quotas. Returns True if there may be more to evict."""
        left = WORK_PAGES_MAX
        for tenant in self._quotas.over():
            policies = self._policies_of(tenant)
            while left and not self._quotas.leaves_room(tenant, 0) and (victim := _first_victim(policies)) is not None:
                self._evict(victim)
                left -= 1
        return left == 0

    def _make_quota(self, record: NamespaceRecord, now_ms: float) -> Room:
        """Evicts pages of a tenant that is at its quota, pages of this size first, until as many bytes are free as one more page
        takes.

        What the tenant holds beyond a quota that was lowered is left to `trim`.
        """
        tenant, size_bytes = record.space.tenant, record.layout.page_bytes
        later = self._later(now_ms)
        policies = [record.policy, *self._policies_of(tenant)]
        freed_bytes = 0
        for _ in range(WORK_PAGES_MAX):
            victim = _first_victim(policies)
            if victim is None:
                return later
            freed_bytes += victim.slot.size_bytes
            self._evict(victim)
            if freed_bytes >= size_bytes or self._quotas.leaves_room(tenant, size_bytes):
                return Room.FREE
        return Room.MAKING

    def _make_room(self, record: NamespaceRecord, now_ms: float) -> Slot | Literal[Room.MAKING, Room.NONE]:
        """Evicts until a slot is free: the policy's victim, or a whole idle extent of another class that was used less recently.

        Without the second choice a class would keep memory that it once took while another class thrashes in one extent. With it,
        memory moves to the classes in use, one extent at a time.
        """
        later = self._later(now_ms)
        free = self._slots.take(record.slot_class)
        if free is not None:
            return free  # freed by a corrupt page whose lease has ended
        victim = record.policy.victim()
        coldest = self._residency.coldest_idle()
        victims = [] if victim is None else [victim]
        if (
            coldest is not None
            and (victim is None or coldest.used < victim.used)
            and next(iter(coldest.pages)).namespace.policy is not record.policy
        ):
            victims = list(islice(coldest.pages, WORK_PAGES_MAX))
        if not victims:
            return later
        for page in victims:
            self._evict(page)
        return self._slots.take(record.slot_class) or Room.MAKING

    def _later(self, now_ms: float) -> Literal[Room.MAKING, Room.NONE]:
        """Returns the answer if nothing can be evicted: MAKING if pages of ended leases are still to be released, else NONE."""
        return Room.MAKING if self._pins.settle(now_ms) else Room.NONE

    def _policies_of(self, tenant: str) -> list[EvictionPolicy[Page]]:
        return [policy for slot_class, policy in self._policies.items() if slot_class.tenant == tenant]

    def _evict(self, page: Page) -> None:
        self._drop(page)
        self.evicted_pages += 1

    def check(self, idle: int) -> None:
        """Asserts that the policies contain `idle` pages. O(classes); for tests."""
        assert sum(map(len, self._policies.values())) == idle


def _first_victim(policies: Sequence[EvictionPolicy[Page]]) -> Page | None:
    return next((page for policy in policies if (page := policy.victim()) is not None), None)
