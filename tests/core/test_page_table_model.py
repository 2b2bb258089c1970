"""The page table against a simple model, through random histories.

The model knows which pages arrive and are sealed, which leases and readers hold them and until when, and where they lie. The table
chooses which page is evicted; the model learns it from the events and checks that the choice was allowed. Conservation is checked
after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable, PinnedPage
from attnstore.core.slots import Slot
from attnstore.errors import LeaseExpired
from attnstore.types import PageEventKind, PageStatus, Space

CAPACITY_BYTES = 1024
PAGE_BYTES = {
    Space("a", b"1" * 32): 128,
    Space("a", b"2" * 32): 128,
    Space("a", b"3" * 32): 60,
    Space("b", b"1" * 32): 128,  # the digest of a's
    Space("b", b"2" * 32): 250,
}
TENANTS = ["a", "b"]
HASHES = [bytes([number]) * 32 for number in range(6)]

spaces = st.sampled_from(list(PAGE_BYTES))
hashes = st.sampled_from(HASHES)
durations_ms = st.integers(1, 60)

Key = tuple[Space, bytes]

lease_ids: Bundle[tuple[Space, bytes]] = Bundle("lease_ids")


@dataclass
class ModelPage:
    slot: Slot
    checksum: int
    readers: int = 0
    leases: set[bytes] = field(default_factory=set)


class TableAndModel(RuleBasedStateMachine):
    """The table, its model, and what holds after every step. A subclass adds rules, which compare answers with the model's."""

    extent_bytes = 256

    def __init__(self) -> None:
        super().__init__()
        ids = count()
        self.table = PageTable(
            capacity_bytes=CAPACITY_BYTES, extent_bytes=self.extent_bytes, new_lease_id=lambda: next(ids).to_bytes(16, "big")
        )
        for space, page_bytes in PAGE_BYTES.items():
            layout = PageLayout(layers=1, kv_heads=1, head_dim=page_bytes // 2, block_tokens=1, dtype=DType.OPAQUE)
            self.table.namespaces.register(space, layout)
        self.now_ms = 0.0
        self.arriving: dict[Key, ModelPage] = {}
        self.sealed: dict[Key, ModelPage] = {}
        self.corrupt: list[tuple[Key, ModelPage]] = []  # some may be free already, if only expired leases held them
        self.lease_ends_ms: dict[bytes, float] = {}
        self.generations: set[int] = set()
        self.sequence = 0

    @rule(step_ms=st.integers(0, 40))
    def time_passes(self, step_ms: int) -> None:
        self.now_ms += step_ms

    @invariant()
    def everything_is_conserved(self) -> None:
        self.table.check()
        pages = self.pages()
        statistics = self.table.statistics()
        assert (statistics.pages_sealed, statistics.pages_arriving) == (len(self.sealed), len(self.arriving))
        surely_bytes = sum(page.slot.size_bytes for _, page in pages)
        perhaps_bytes = sum(page.slot.size_bytes for _, page in self.corrupt if not self.is_pinned(page))
        assert surely_bytes <= statistics.used_bytes <= min(surely_bytes + perhaps_bytes, CAPACITY_BYTES)
        tenants: dict[int, set[tuple[str, int]]] = {}
        for (space, _), page in pages:
            tenants.setdefault(page.slot.extent, set()).add((space.tenant, page.slot.tenancy))
        assert all(len(owners) == 1 for owners in tenants.values()), "an extent shows pages of two tenants"
        ends_bytes = 0
        for slot in sorted((page.slot for _, page in pages), key=self.address):
            assert self.address(slot) >= ends_bytes, "two slots overlap"
            ends_bytes = self.address(slot) + slot.size_bytes
        assert ends_bytes <= CAPACITY_BYTES

    def teardown(self) -> None:
        """Whatever the history was, the arena is completely free once all holders release their pages."""
        self.now_ms += 1e6
        for key, page in list(self.sealed.items()):
            if not page.readers:
                assert self.table.delete(key[0], [key[1]], self.now_ms) == [PageStatus.OK]
                del self.sealed[key]
        self.table.check()
        assert self.table.statistics().pages_sealed == sum(page.readers > 0 for page in self.sealed.values())

    def pages(self) -> list[tuple[Key, ModelPage]]:
        """The pages that certainly have a slot."""
        held = [(key, page) for key, page in self.corrupt if self.is_pinned(page)]
        return [*self.arriving.items(), *self.sealed.items(), *held]

    def address(self, slot: Slot) -> int:
        return slot.extent * self.extent_bytes + slot.offset_bytes

    def is_live(self, lease_id: bytes) -> bool:
        return self.now_ms < self.lease_ends_ms.get(lease_id, 0.0)

    def is_pinned(self, page: ModelPage) -> bool:
        return page.readers > 0 or any(map(self.is_live, page.leases))

    def has_room(self, space: Space) -> bool:
        """Returns whether a page can get a slot: a free slot or extent, an evictable page of its class, or an idle extent."""
        by_extent: dict[int, list[Key]] = {}
        for key, page in self.pages():
            by_extent.setdefault(page.slot.extent, []).append(key)
        if len(by_extent) < CAPACITY_BYTES // self.extent_bytes:
            return True
        own_class = (space.tenant, PAGE_BYTES[space])
        for keys in by_extent.values():
            evictable = [key in self.sealed and not self.is_pinned(self.sealed[key]) for key in keys]
            owner = keys[0][0]
            is_own = (owner.tenant, PAGE_BYTES[owner]) == own_class
            if all(evictable) or (is_own and (any(evictable) or len(keys) < self.extent_bytes // PAGE_BYTES[space])):
                return True
        return False

    def learn_evictions(self) -> None:
        for space, event in self.table.take_events():
            key = (space, event.hash)
            assert event.kind is PageEventKind.EVICTED
            assert not self.is_pinned(self.sealed[key]), "a pinned page was evicted"
            del self.sealed[key]
            self.sequence += 1
            assert event.sequence == self.sequence

    def expect_event(self, kind: PageEventKind, key: Key) -> None:
        ((space, event),) = self.table.take_events()
        self.sequence += 1
        assert (event.kind, space, event.hash, event.sequence) == (kind, *key, self.sequence)


class WriteRules(TableAndModel):
    """Pages arrive, are sealed and are deleted."""

    arriving_pages = Bundle("arriving_pages")

    @rule(target=arriving_pages, space=spaces, page_hash=hashes, checksum=st.integers(0, 9))
    def prepare(self, space: Space, page_hash: bytes, checksum: int) -> object:
        key = (space, page_hash)
        room = self.has_room(space)
        answer = self.table.prepare(space, page_hash, checksum, self.now_ms)
        self.learn_evictions()
        if key in self.sealed:
            assert answer is PageStatus.ALREADY_PRESENT
        elif key in self.arriving:
            assert answer is PageStatus.ARRIVING
        elif not room:
            assert answer is PageStatus.NO_SPACE
        else:
            assert isinstance(answer, ArrivingPage)
            assert answer.slot.generation not in self.generations
            assert answer.slot.size_bytes == PAGE_BYTES[space]
            self.generations.add(answer.slot.generation)
            self.arriving[key] = ModelPage(answer.slot, checksum)
            return (key, answer)
        return multiple()

    @rule(space=spaces, page_hashes=st.lists(hashes, min_size=1, max_size=3))
    def store(self, space: Space, page_hashes: list[bytes]) -> None:
        for page_hash in page_hashes:
            page = self.prepare(space, page_hash, 0)
            if isinstance(page, tuple):
                self.complete(page)

    @rule(page=consumes(arriving_pages))
    def complete(self, page: tuple[Key, ArrivingPage]) -> None:
        key, arriving = page
        self.table.complete(arriving, self.now_ms)
        self.sealed[key] = self.arriving.pop(key)
        self.expect_event(PageEventKind.SEALED, key)

    @rule(page=consumes(arriving_pages))
    def abort(self, page: tuple[Key, ArrivingPage]) -> None:
        self.table.abort(page[1])
        del self.arriving[page[0]]

    @rule(space=spaces, page_hash=hashes)
    def delete(self, space: Space, page_hash: bytes) -> None:
        key = (space, page_hash)
        [status] = self.table.delete(space, [page_hash], self.now_ms)
        if key not in self.sealed:
            assert status is PageStatus.MISSING
        elif self.is_pinned(self.sealed[key]):
            assert status is PageStatus.PINNED
        else:
            assert status is PageStatus.OK
            del self.sealed[key]
            self.expect_event(PageEventKind.DELETED, key)


class LeaseRules(TableAndModel):
    """Leases are given, renewed and released, and end."""

    @rule(
        target=lease_ids,
        space=spaces,
        prefixes=st.lists(st.lists(hashes, max_size=4), max_size=3),
        lease_ms=st.just(0) | durations_ms,
    )
    def match(self, space: Space, prefixes: list[list[bytes]], lease_ms: int) -> object:
        outcome = self.table.match(space, prefixes, lease_ms, self.now_ms)
        hit_keys = set()
        for prefix, hits in zip(prefixes, outcome.hits, strict=True):
            keys = [(space, page_hash) for page_hash in prefix]
            assert all(key in self.sealed for key in keys[:hits])
            assert hits == len(prefix) or keys[hits] not in self.sealed
            hit_keys.update(keys[:hits])
        if not (hit_keys and lease_ms):
            assert outcome.lease_id is None
            return multiple()
        assert outcome.lease_id is not None
        assert outcome.lease_ms == lease_ms
        self.lease_ends_ms[outcome.lease_id] = self.now_ms + lease_ms
        for key in hit_keys:
            self.sealed[key].leases.add(outcome.lease_id)
        return (space, outcome.lease_id)

    @precondition(lambda self: self.sealed)
    @rule(target=lease_ids, data=st.data(), lease_ms=durations_ms)
    def lease_what_is_there(self, data: st.DataObject, lease_ms: int) -> object:
        space = data.draw(st.sampled_from(sorted({space for space, _ in self.sealed})))
        there = st.sampled_from(sorted(page_hash for owner, page_hash in self.sealed if owner == space))
        return self.match(space, data.draw(st.lists(st.lists(there, min_size=1, max_size=4), min_size=1, max_size=2)), lease_ms)

    @rule(lease=lease_ids, tenant=st.sampled_from(TENANTS), lease_ms=durations_ms)
    def renew(self, lease: tuple[Space, bytes], tenant: str, lease_ms: int) -> None:
        if self.is_live(lease[1]) and tenant == lease[0].tenant:
            end_ms = max(self.lease_ends_ms[lease[1]], self.now_ms + lease_ms)
            assert self.table.pins.renew(tenant, lease[1], lease_ms, self.now_ms) == end_ms - self.now_ms
            self.lease_ends_ms[lease[1]] = end_ms
        else:
            with pytest.raises(LeaseExpired):
                self.table.pins.renew(tenant, lease[1], lease_ms, self.now_ms)

    @rule(lease=lease_ids, tenant=st.sampled_from(TENANTS))
    def release(self, lease: tuple[Space, bytes], tenant: str) -> None:
        released = self.is_live(lease[1]) and tenant == lease[0].tenant
        assert self.table.pins.release(tenant, lease[1], self.now_ms) == released
        if released:
            del self.lease_ends_ms[lease[1]]

    @rule()
    def expire(self) -> None:
        live_ms = [end_ms for lease_id, end_ms in self.lease_ends_ms.items() if self.is_live(lease_id)]
        assert self.table.pins.expire(self.now_ms) == min(live_ms, default=None)
        assert self.table.statistics().leases == len(live_ms)
        self.corrupt = [(key, page) for key, page in self.corrupt if self.is_pinned(page)]
        assert self.table.statistics().pages_pinned == len(self.corrupt) + sum(map(self.is_pinned, self.sealed.values()))


class ReadRules(TableAndModel):
    """Readers hold pages, and find some of them corrupt."""

    pinned_pages = Bundle("pinned_pages")

    @rule(target=pinned_pages, space=spaces, page_hash=hashes, lease=st.none() | lease_ids)
    def pin(self, space: Space, page_hash: bytes, lease: tuple[Space, bytes] | None) -> object:
        key = (space, page_hash)
        answer = self.table.pin(space, page_hash, lease[1] if lease else None, self.now_ms)
        if self.expects_page(key, lease, answer):
            self.sealed[key].readers += 1
            return (self.sealed[key], key, answer)
        return multiple()

    @rule(space=spaces, page_hashes=st.lists(hashes, max_size=4), lease=st.none() | lease_ids)
    def use(self, space: Space, page_hashes: list[bytes], lease: tuple[Space, bytes] | None) -> None:
        answers = self.table.use(space, page_hashes, lease[1] if lease else None, self.now_ms)
        for page_hash, answer in zip(page_hashes, answers, strict=True):
            self.expects_page((space, page_hash), lease, answer)

    def expects_page(self, key: Key, lease: tuple[Space, bytes] | None, answer: object) -> bool:
        """Returns whether the read must find the page; asserts that the answer agrees, or gives the right reason."""
        if lease and not (lease[0] == key[0] and self.is_live(lease[1])):
            assert answer is PageStatus.LEASE_EXPIRED
            return False
        if key not in self.sealed:
            assert answer is PageStatus.MISSING
            return False
        assert isinstance(answer, PinnedPage)
        assert (answer.slot, answer.checksum) == (self.sealed[key].slot, self.sealed[key].checksum)
        return True

    @rule(page=consumes(pinned_pages))
    def unpin(self, page: tuple[ModelPage, Key, PinnedPage]) -> None:
        model, key, pinned = page
        assert self.sealed.get(key) is model or (key, model) in self.corrupt, "a pinned page was replaced"
        assert model.slot is pinned.slot, "a pinned page moved"
        self.table.unpin(pinned)
        model.readers -= 1
        if not self.is_pinned(model) and not model.leases:
            self.corrupt = [(known, other) for known, other in self.corrupt if other is not model]

    @rule(space=spaces, page_hash=hashes, intact=st.booleans())
    def verify(self, space: Space, page_hash: bytes, intact: bool) -> None:
        key = (space, page_hash)
        page = self.table.peek(space, page_hash)
        assert (page is not None) == (key in self.sealed)
        if page is not None:
            assert self.table.verified(page, self.now_ms, intact=intact) is not intact
            if not intact:
                self.condemn(key)

    @rule(page=pinned_pages)
    def verify_pinned(self, page: tuple[ModelPage, Key, PinnedPage]) -> None:
        """A reader that holds a page finds it corrupt; another reader may have found it before."""
        model, key, pinned = page
        is_first = self.sealed.get(key) is model
        assert self.table.verified(pinned, self.now_ms, intact=False) is is_first
        if is_first:
            self.condemn(key)

    def condemn(self, key: Key) -> None:
        self.expect_event(PageEventKind.EVICTED, key)
        model = self.sealed.pop(key)
        if model.readers or model.leases:
            self.corrupt.append((key, model))


class PageTableMachine(WriteRules, LeaseRules, ReadRules):
    """All rules together."""


@pytest.mark.parametrize("extent_bytes", [256, 512, 1024])
def test_the_table_agrees_with_the_model_through_random_histories(extent_bytes: int) -> None:
    machine = type("Machine", (PageTableMachine,), {"extent_bytes": extent_bytes})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=60))


@settings(max_examples=150)
@given(
    pages_max=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from(["store", "match", "pin", "use", "delete"]), st.integers(0, 9)), max_size=80),
)
def test_one_class_keeps_exactly_the_most_recently_used_pages(pages_max: int, steps: list[tuple[str, int]]) -> None:
    space = Space("a", b"n" * 32)
    table = PageTable(capacity_bytes=pages_max * 64, extent_bytes=64, new_lease_id=lambda: bytes(16))
    table.namespaces.register(space, PageLayout(layers=1, kv_heads=1, head_dim=32, block_tokens=1, dtype=DType.OPAQUE))
    recent: list[int] = []
    for verb, number in steps:
        page_hash = bytes([number]) * 32
        if verb == "store":
            page = table.prepare(space, page_hash, 0, 0.0)
            if isinstance(page, ArrivingPage):
                table.complete(page, 0.0)
        elif verb == "match":
            table.match(space, [[page_hash]], 0, 0.0)
        elif verb == "pin":
            pinned = table.pin(space, page_hash, None, 0.0)
            if isinstance(pinned, PinnedPage):
                table.unpin(pinned)
        elif verb == "use":
            table.use(space, [page_hash], None, 0.0)
        else:
            table.delete(space, [page_hash], 0.0)
        if number in recent or verb == "store":
            recent = [other for other in recent if other != number] + [number] * (verb != "delete")
            recent = recent[-pages_max:]
        table.check()
        assert table.statistics().pages_sealed == len(recent)
    assert [n for n in range(10) if table.delete(space, [bytes([n]) * 32], 0.0) == [PageStatus.OK]] == sorted(recent)
