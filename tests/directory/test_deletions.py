"""Deletions that a node publishes: their bounds, their ages, and records that no node wrote."""

from __future__ import annotations

import json

import pytest

from attnstore.directory.deletions import Deletion, DeletionFeed
from attnstore.errors import ProtocolError
from attnstore.limits import DELETION_HASHES_MAX, DELETIONS_IN_BEAT_MAX, DELETIONS_MAX, RECORD_BYTES_MAX, TOMBSTONE_MS_MAX
from attnstore.testing import ManualClock
from attnstore.types import Space

SPACE = Space("tenant", bytes(32))


def hashes(count: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(count)]


def test_a_large_deletion_is_published_in_parts_that_fit_a_record_and_grows_older_meanwhile() -> None:
    clock = ManualClock()
    feed = DeletionFeed(clock)
    asked = hashes(DELETION_HASHES_MAX * (DELETIONS_IN_BEAT_MAX + 2))
    feed.offer(SPACE, asked)
    first = feed.take()
    clock.advance_ms(1_000)
    feed.lost(first[1:])
    again, last = feed.take(), feed.take()
    assert [page_hash for part in (first[:1], again, last) for each in part for page_hash in each.hashes] == asked
    assert {each.age_ms for each in first} == {0}
    assert {each.age_ms for each in last} == {1_000}
    assert max(len(each.to_json()) for each in first) <= RECORD_BYTES_MAX
    assert feed.take() == []


def test_what_is_too_old_or_too_much_is_not_published() -> None:
    clock = ManualClock()
    feed = DeletionFeed(clock)
    feed.offer(SPACE, hashes(1))
    clock.advance_ms(TOMBSTONE_MS_MAX)
    assert feed.take() == []
    for _ in range(DELETIONS_MAX + 5):
        feed.offer(SPACE, hashes(1))
    taken = 0
    while part := feed.take():
        taken += len(part)
    assert taken == DELETIONS_MAX


def test_a_tenant_that_deletes_without_end_neither_holds_up_nor_pushes_out_anothers_deletions() -> None:
    feed = DeletionFeed(ManualClock())
    other = Space("other", bytes(32))
    feed.offer(other, hashes(1))
    for _ in range(DELETIONS_MAX + 5):
        feed.offer(SPACE, hashes(1))
    feed.offer(other, hashes(2))
    taken = feed.take()
    assert len(taken) == DELETIONS_IN_BEAT_MAX
    assert [len(each.hashes) for each in taken if each.space == other] == [1, 2]


def test_a_deletion_survives_its_record() -> None:
    deletion = Deletion(SPACE, tuple(hashes(3)), 7)
    assert Deletion.from_json(deletion.to_json()) == deletion


@pytest.mark.parametrize(
    "record",
    [
        "nonsense",
        "[]",
        json.dumps(["tenant", "00", "", 0]),
        json.dumps(["tenant", "00" * 32, "00", 0]),
        json.dumps(["tenant", "00" * 32, "", -1]),
        json.dumps(["tenant", "00" * 32, "", 10**400]),
        json.dumps(["tenant", "00" * 32, "00" * 32 * (DELETION_HASHES_MAX + 1), 0]),
        '["tenant", "' + "00" * 32 + '", "", 1e999]',
    ],
)
def test_a_record_that_is_no_deletion_is_a_typed_error(record: str) -> None:
    with pytest.raises(ProtocolError):
        Deletion.from_json(record)
