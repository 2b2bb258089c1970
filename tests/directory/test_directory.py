"""The contract of a directory, on each implementation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from attnstore import PageEvent, PageEventKind
from attnstore.directory import Directory, EventBatch, Intent, LayoutRecord, Member, NodeState
from attnstore.directory.deletions import Deletion
from attnstore.directory.events import EventFeed
from attnstore.limits import DIRECTORY_GAP_MS
from attnstore.types import Space

ADA = Member("ada", "grpc://10.0.0.1:7400", bytes(16), weight=2.0, replicas=2)
BOB = Member("bob", "grpcs://10.0.0.2:7400", b"e" * 16, state=NodeState.DRAINED)
TTL_MS = 60_000
BRIEF_MS = 50
SHORT_MS = 500


def events(number: int) -> bytes:
    """Returns a packed event."""
    feed = EventFeed("ada")
    feed.offer([(Space("tenant", bytes(32)), PageEvent(PageEventKind.SEALED, bytes(32), number))])
    batch = feed.take()
    assert batch is not None
    return batch.packed


async def test_a_member_is_found_as_it_announced_itself(directory: Directory) -> None:
    await directory.announce(ADA, TTL_MS, None)
    membership = await directory.announce(BOB, TTL_MS, None)
    assert membership is not None
    assert set(membership.members) == {ADA, BOB}


async def test_whoever_knows_the_revision_is_told_nothing_until_something_changes(directory: Directory) -> None:
    first = await directory.announce(ADA, TTL_MS, None)
    assert first is not None
    assert await directory.announce(ADA, TTL_MS, first.revision) is None
    assert await directory.membership(first.revision) is None
    second = await directory.announce(BOB, TTL_MS, first.revision)
    assert second is not None
    assert await directory.membership(first.revision) == second
    assert await directory.membership(second.revision) is None


async def test_a_member_whose_heartbeat_is_overdue_is_gone(directory: Directory) -> None:
    known = await directory.announce(ADA, TTL_MS, None)
    await directory.announce(BOB, BRIEF_MS, None)
    assert known is not None
    await asyncio.sleep(2 * BRIEF_MS / 1000)
    membership = await directory.membership(known.revision)
    assert membership is not None
    assert membership.members == (ADA,)


async def test_a_member_that_withdraws_is_gone_at_once_with_what_was_wanted_of_it(directory: Directory) -> None:
    await directory.announce(ADA, TTL_MS, None)
    assert await directory.set_intent("ada", Intent.DRAIN)
    await directory.withdraw("ada")
    await directory.withdraw("nobody")
    again = await directory.announce(ADA, TTL_MS, None)
    assert again is not None
    assert (again.members, again.intents) == ((ADA,), {})


async def test_intents_of_members_are_kept_and_of_others_refused(directory: Directory) -> None:
    await directory.announce(ADA, TTL_MS, None)
    assert not await directory.set_intent("nobody", Intent.EVICT)
    assert await directory.set_intent("ada", Intent.EVICT)
    evicted = await directory.membership(None)
    assert evicted is not None
    assert evicted.intents == {"ada": Intent.EVICT}
    assert evicted.present() == {}
    assert await directory.set_intent("ada", None)
    served = await directory.membership(evicted.revision)
    assert served is not None
    assert served.present() == {"ada": ADA}


async def test_what_is_wanted_of_a_node_outlives_a_heartbeat_that_is_overdue_and_can_be_lifted_meanwhile(
    directory: Directory,
) -> None:
    await directory.announce(ADA, TTL_MS, None)
    await directory.announce(BOB, BRIEF_MS, None)
    assert await directory.set_intent("bob", Intent.EVICT)
    await asyncio.sleep(2 * BRIEF_MS / 1000)
    gone = await directory.announce(ADA, TTL_MS, None)
    assert gone is not None
    assert gone.members == (ADA,)
    back = await directory.announce(BOB, BRIEF_MS, gone.revision)
    assert back is not None
    assert back.present() == {"ada": ADA}
    await asyncio.sleep(2 * BRIEF_MS / 1000)
    assert await directory.set_intent("bob", None)
    again = await directory.announce(BOB, TTL_MS, back.revision)
    assert again is not None
    assert again.present() == {"ada": ADA, "bob": BOB}


async def test_a_directory_that_was_away_takes_nobody_for_gone_before_he_had_his_time(directory: Directory) -> None:
    first = await directory.announce(ADA, SHORT_MS, None)
    second = await directory.announce(BOB, SHORT_MS, None)
    assert await directory.set_intent("bob", Intent.DRAIN)
    assert first is not None
    assert second is not None
    await asyncio.sleep((DIRECTORY_GAP_MS + 2 * BRIEF_MS) / 1000)
    away = await directory.membership(None)
    assert away is not None
    assert set(away.members) == {ADA, BOB}
    ended = await directory.announce(ADA, TTL_MS, second.revision)
    assert ended is not None
    assert set(ended.members) == {ADA, BOB}
    assert ended.intents == {"bob": Intent.DRAIN}
    await asyncio.sleep(2 * SHORT_MS / 1000)
    late = await directory.announce(ADA, TTL_MS, ended.revision)
    assert late is not None
    assert late.members == (ADA,)


async def test_a_node_that_is_to_drain_counts_as_draining_before_it_says_so(directory: Directory) -> None:
    await directory.announce(ADA, TTL_MS, None)
    await directory.set_intent("ada", Intent.DRAIN)
    membership = await directory.membership(None)
    assert membership is not None
    assert membership.present()["ada"].state is NodeState.DRAINING


async def test_quotas_are_set_and_lifted(directory: Directory) -> None:
    await directory.announce(ADA, TTL_MS, None)
    await directory.set_quota("tenant", 5 << 30)
    limited = await directory.membership(None)
    await directory.set_quota("tenant", None)
    lifted = await directory.membership(None)
    assert limited is not None
    assert lifted is not None
    assert (limited.quota_bytes, lifted.quota_bytes) == ({"tenant": 5 << 30}, {})


async def test_deletions_are_told_once_to_each_who_asks_and_age(directory: Directory) -> None:
    first = Deletion(Space("tenant", bytes(32)), (b"a" * 32, b"b" * 32), 1_000)
    second = Deletion(Space("other", b"o" * 32), (), 0)
    assert await directory.deletions(None) == ([], None)
    await directory.publish_deletions("ada", [first, second])
    await asyncio.sleep(BRIEF_MS / 1000)
    for _ in range(2):
        told, position = await directory.deletions(None)
        assert [(deletion.space, deletion.hashes) for deletion in told] == [(each.space, each.hashes) for each in (first, second)]
        assert BRIEF_MS - 2 <= told[1].age_ms < told[0].age_ms - 900
    assert await directory.deletions(position) == ([], position)
    await directory.publish_deletions("bob", [second])
    told, later = await directory.deletions(position)
    assert [deletion.space for deletion in told] == [second.space]
    assert (await directory.deletions(later))[0] == []


async def test_layouts_are_listed_once_each(directory: Directory) -> None:
    records = [LayoutRecord(bytes([number]) * 32, "tenant", 4096 + number) for number in range(3)]
    records.append(LayoutRecord(bytes([2]) * 32, "with the same model", 4098))
    await directory.put_layouts(records[:2])
    await directory.put_layouts(records[1:])
    assert sorted(await directory.layouts(), key=records.index) == records


async def test_events_published_from_now_on_are_read_in_order_and_once(directory: Directory) -> None:
    await directory.publish(EventBatch("ada", events(99)))
    nothing, position = await directory.events(None, 1)
    batches = [EventBatch("ada", events(number), number) for number in range(3)]
    for batch in batches:
        await directory.publish(batch)
    read, position = await directory.events(position, 1)
    assert (nothing, read) == ([], batches)
    assert (await directory.events(position, 1))[0] == []


async def test_whoever_waits_for_events_gets_them_when_they_come(directory: Directory) -> None:
    _, position = await directory.events(None, 1)
    waiting = asyncio.create_task(directory.events(position, 400))
    await asyncio.sleep(0.05)
    await directory.publish(EventBatch("ada", events(1)))
    batches, _ = await waiting
    assert batches == [EventBatch("ada", events(1))]


def test_a_member_survives_its_record_and_one_of_an_older_version_has_no_hot_segments() -> None:
    hot = replace(ADA, hot=frozenset({bytes(7), bytes(range(7))}))
    assert Member.from_json(hot.to_json()) == hot
    fields = json.loads(ADA.to_json())
    del fields["hot"]
    assert Member.from_json(json.dumps(fields)) == ADA
