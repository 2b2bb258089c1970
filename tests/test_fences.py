"""Stamps and the bytes next to them: every writer or reader of a stamp fences, at the right moment."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from attnstore import fences
from attnstore.arena import stamped
from attnstore.arena.shm import ShmArena
from attnstore.client.transports import mapped, shm
from attnstore.client.transports.mapped import MappedExtent, PageViews
from attnstore.core.hashing import layer_checksums, range_checksum
from attnstore.core.slots import Slot
from attnstore.types import Lease, PageStatus
from attnstore.wire.shm import Place
from attnstore_worker.cache.store import shared_tier
from attnstore_worker.cache.store.leases import KeptLease
from attnstore_worker.cache.store.shared_tier import SharedPages
from tests.channels import read_plan
from tests.samples import SMALL, make_batch

EXTENT_BYTES = 4 * SMALL.page_bytes
OLD, NEW = (Slot(0, 0, SMALL.page_bytes, generation, 1) for generation in (3, 4))


@pytest.fixture
def arena() -> Iterator[ShmArena]:
    arena = ShmArena(2 * EXTENT_BYTES, EXTENT_BYTES)
    arena.view(OLD)[:] = bytes([7]) * SMALL.page_bytes
    yield arena
    arena.close()


@pytest.fixture
def extent(arena: ShmArena) -> Iterator[MappedExtent]:
    """The extent as a reader sees it."""
    descriptor = arena.descriptor(0, 1)
    assert descriptor is not None
    yield MappedExtent(descriptor, arena.layout, 0, arena.layout.file_bytes, None)
    os.close(descriptor)


@pytest.fixture
def place(arena: ShmArena) -> Place:
    return Place(0, 1, 0, SMALL.page_bytes, arena.stamp(OLD), checksum=0)


def test_the_node_fences_between_a_new_stamp_and_the_window_that_goes_with_it(
    arena: ShmArena, extent: MappedExtent, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    monkeypatch.setattr(stamped, "write_fence", lambda: seen.append((extent.holds(place), extent.view(0, 1)[0])))
    arena.view(NEW)[:] = bytes([8]) * SMALL.page_bytes
    assert seen == [(False, 7)], "the stamp is new by then, the bytes are not"
    arena.view(NEW)
    assert len(seen) == 1, "a window that is only looked at costs nothing"


def test_the_node_fences_after_it_has_voided_an_extent(
    arena: ShmArena, extent: MappedExtent, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    monkeypatch.setattr(stamped, "write_fence", lambda: seen.append((extent.holds(place), extent.view(0, 1)[0])))
    arena.view(Slot(0, 0, SMALL.page_bytes, 5, tenancy=2))
    assert seen[0] == (False, 7)


Ask = Callable[[MappedExtent, Place], bool]


def holds(extent: MappedExtent, place: Place) -> bool:
    return extent.holds(place)


def views(extent: MappedExtent, place: Place) -> bool:
    return PageViews([(place, extent)], 0, SMALL.page_bytes).verify() == (PageStatus.OK,)


def copies(extent: MappedExtent, place: Place) -> bool:
    batch = make_batch(1, model="fence")
    plan = read_plan(batch, [bytearray(SMALL.layer_bytes)], layers=(0, 1))
    layer = extent.view(place.offset_bytes, place.offset_bytes + SMALL.layer_bytes)
    sealed = range_checksum(layer_checksums(layer, SMALL.layer_bytes))
    shm._land(plan, 0, (place._replace(checksum=sealed), extent), 0)
    return plan.landing.result().leading_hits == 1


def uses_in_place(extent: MappedExtent, place: Place) -> bool:
    return SharedPages((0,), [(place, extent)], KeptLease(Lease(bytes(16), 1)), lambda _: None).intact()


@pytest.mark.parametrize("ask", [holds, views, copies, uses_in_place])
def test_a_reader_fences_before_it_looks_at_a_stamp_for_the_last_time(
    arena: ShmArena, extent: MappedExtent, place: Place, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(extent, place)

    def recycled() -> None:
        arena.view(NEW)

    for reader in (mapped, shm, shared_tier):
        monkeypatch.setattr(reader, "read_fence", recycled)
    assert not ask(extent, place)


@pytest.mark.parametrize(("machine", "fences_loads"), [("x86_64", False), ("AMD64", False), ("aarch64", True), ("riscv64", True)])
def test_loads_are_fenced_where_the_machine_may_reorder_them(
    machine: str, fences_loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(platform, "machine", lambda: machine)
        chosen = importlib.reload(fences)
        assert (chosen.read_fence is chosen.write_fence) == fences_loads
    importlib.reload(fences)


def test_a_fence_releases_its_lock_and_then_takes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Lock:
        def acquire(self) -> None:
            steps.append("acquire")

        def release(self) -> None:
            steps.append("release")

    monkeypatch.setattr(fences, "threading", SimpleNamespace(Lock=Lock))
    fences.write_fence()
    assert steps == ["acquire", "release"] * 2
