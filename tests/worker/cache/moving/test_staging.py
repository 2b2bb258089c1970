"""The slots of staging: each is used by one load at a time, in the order of the requests, and after its last copy up."""

from __future__ import annotations

import threading

import pytest

from attnstore.core.layout import PageLayout
from attnstore_worker.cache.moving.staging import PART_BYTES, PART_PAGES_MAX, STAGING_PARTS, Staging
from attnstore_worker.device.base import Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import SimulatedDevice
from tests.samples import eventually

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=16, block_tokens=16)


def staging_of(blocks: int = 4, device: SimulatedDevice | None = None) -> Staging:
    return Staging(device or SimulatedDevice("late"), LAYOUT, blocks)


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("layers", "block_tokens", "blocks", "pages"), [(1, 16, 9_999, PART_PAGES_MAX), (8, 256, 9_999, 2), (2, 16, 3, 3)]
)
def test_a_part_is_bounded_in_bytes_in_pages_and_by_the_pool(layers: int, block_tokens: int, blocks: int, pages: int) -> None:
    layout = PageLayout(layers=layers, kv_heads=8, head_dim=128, block_tokens=block_tokens)
    staging = Staging(HostDevice(), layout, blocks)
    assert staging.part_pages == pages
    assert staging.part_pages * layout.page_bytes <= PART_BYTES
    assert staging.pages.capacity == staging.slots == STAGING_PARTS * pages


def test_requests_get_all_their_slots_in_the_order_in_which_they_asked() -> None:
    """The second request would fit at once, and waits behind the first, which needs more."""
    staging, order = staging_of(), []
    taken = [staging.take(4, never) for _ in range(STAGING_PARTS)]
    staging.give_back(taken[0][:2], None)

    def ask(name: str, pages: int) -> None:
        slots = staging.take(pages, never)
        order.append((name, len(slots)))
        staging.give_back(slots, None)

    first = threading.Thread(target=ask, args=("first", 4))
    first.start()
    assert eventually(lambda: staging.waiting == 1)
    second = threading.Thread(target=ask, args=("second", 1))
    second.start()
    assert eventually(lambda: staging.waiting == 2)
    assert order == []
    assert staging.take_at_once(1) == [], "nobody passes those who wait"
    staging.give_back(taken[1], None)
    first.join()
    second.join()
    assert order == [("first", 4), ("second", 1)]
    staging.check()
    for slots in (taken[0][2:], *taken[2:]):
        staging.give_back(slots, None)
    assert staging.taken == 0
    staging.check()


def test_a_request_that_is_given_up_takes_nothing() -> None:
    staging = staging_of()
    taken = [staging.take(4, never) for _ in range(STAGING_PARTS)]
    assert staging.take(1, lambda: True) == []
    assert staging.taken == staging.slots
    staging.give_back(taken[0], None)
    assert staging.take(4, lambda: True) != [], "slots that are free are taken without asking"
    staging.check()


def test_a_read_in_one_piece_leaves_half_of_the_slots_to_others() -> None:
    staging = staging_of()
    assert staging.take_at_once(staging.slots // 2 + 1) == []
    half = staging.take_at_once(staging.slots // 2)
    assert len(half) == staging.slots // 2
    staging.give_back(half, None)
    staging.check()


def test_a_slot_that_is_copied_up_is_given_out_after_its_copy() -> None:
    device = SimulatedDevice("late")
    staging = staging_of(device=device)
    copies = device.copies(device.blocks(LAYOUT, 4))
    slots = staging.take(4, never)
    staging.give_back(slots, copies.up(staging.pages.tensor, slots, [0, 1, 2, 3]))
    assert {slot for _ in range(STAGING_PARTS) for slot in staging.take(4, never)} >= set(slots)
    assert device.races.found == []


def test_a_slot_that_is_given_out_before_its_copy_is_a_race() -> None:
    device = SimulatedDevice("late", without=Wait.STAGING_AFTER_UP)
    staging = staging_of(device=device)
    copies = device.copies(device.blocks(LAYOUT, 4))
    slots = staging.take(4, never)
    for _ in range(STAGING_PARTS - 1):
        staging.take(4, never)
    staging.give_back(slots, copies.up(staging.pages.tensor, slots, [0, 1, 2, 3]))
    with pytest.raises(Unsynchronised):
        staging.take(4, never)
    staging.check()
