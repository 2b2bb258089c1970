"""Views: current and previous owners of a segment, whatever the directory answers or fails to answer."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore.core.placement import Placement
from attnstore.directory import ClusterView, Intent, Member, Membership, NodeState, Revision, ViewTracker
from attnstore.directory.moves import Moves, is_same_cluster
from attnstore.limits import MEMBER_MS_MAX, PREVIOUS_OWNERS_MS_MAX

KEYS = [bytes([number] * 7) for number in range(60)]


def member(name: str, state: NodeState = NodeState.ACTIVE, replicas: int = 1, epoch: int = 0) -> Member:
    return Member(name, f"grpc://{name}:7400", bytes([epoch]) * 16, replicas=replicas, state=state)


def membership(number: int, *members: Member, incarnation: str = "first", **intents: Intent) -> Membership:
    return Membership(Revision(incarnation, number), members, intents)


def tracked(*memberships: Membership, at_ms: float = 0.0) -> ViewTracker:
    tracker = ViewTracker()
    for each in memberships:
        tracker.observe(each, at_ms)
    return tracker


def test_a_directory_that_says_nothing_new_leaves_the_view_as_it_is() -> None:
    tracker = tracked(membership(1, member("a"), member("b")))
    before = tracker.view
    assert tracker.observe(None, 1e9) == before


def test_a_segment_is_looked_for_where_it_was_before_a_node_joined() -> None:
    tracker = tracked(membership(1, member("a"), member("b")))
    old = {key: tracker.view.owners(key) for key in KEYS}
    view = tracker.observe(membership(2, member("a"), member("b"), member("c")), 1.0)
    moved = [key for key in KEYS if view.owners(key) == ["c"]]
    assert moved
    assert all(view.holders(key) == ["c", *old[key]] for key in moved)
    assert all(view.holders(key) == old[key] for key in KEYS if key not in moved)


def test_earlier_owners_are_forgotten_in_time() -> None:
    tracker = tracked(membership(1, member("a")), membership(2, member("a"), member("b")))
    assert any(len(tracker.view.holders(key)) == 2 for key in KEYS)
    view = tracker.observe(None, PREVIOUS_OWNERS_MS_MAX + 1.0)
    assert all(len(view.holders(key)) == 1 for key in KEYS)


def test_an_earlier_owner_that_has_left_is_not_asked() -> None:
    view = tracked(membership(1, member("a"), member("b")), membership(2, member("a"))).view
    assert all(view.holders(key) == ["a"] for key in KEYS)


def test_a_draining_node_owns_nothing_and_is_still_asked_by_those_who_never_saw_it_active() -> None:
    view = tracked(membership(1, member("a"), member("b", NodeState.DRAINING))).view
    assert all(view.owners(key) == ["a"] for key in KEYS)
    assert {tuple(view.holders(key)) for key in KEYS} == {("a",), ("a", "b")}


def test_an_evicted_node_is_not_asked() -> None:
    view = tracked(membership(1, member("a"), member("b")), membership(2, member("a"), member("b"), b=Intent.EVICT)).view
    assert all(view.holders(key) == ["a"] for key in KEYS)


def test_the_cluster_keeps_the_most_copies_that_any_node_was_told_to() -> None:
    view = tracked(membership(1, member("a"), member("b", replicas=2), member("c"))).view
    assert all(len(view.owners(key)) == 2 for key in KEYS)


def test_a_node_that_cannot_be_used_is_passed_over() -> None:
    view = tracked(membership(1, member("a"), member("b"), member("c"))).view
    for key in KEYS:
        first, second = view.placement.ranked(key)[:2]
        assert view.owners(key, {"a", "b", "c"} - {first}) == [second]


def test_a_directory_that_lost_its_memory_removes_nobody_before_all_had_time_for_a_heartbeat() -> None:
    tracker = tracked(membership(1, member("a"), member("b"), member("c")))
    partly = membership(1, member("a"), incarnation="second")
    assert set(tracker.observe(partly, 10.0).members) == {"a", "b", "c"}
    assert set(tracker.observe(None, 10.0 + MEMBER_MS_MAX / 2).members) == {"a", "b", "c"}
    back = membership(2, member("a"), member("b"), incarnation="second")
    tracker.observe(back, 20.0)
    assert set(tracker.observe(None, 10.0 + MEMBER_MS_MAX).members) == {"a", "b"}


def test_a_new_membership_of_the_same_directory_removes_at_once() -> None:
    tracker = tracked(membership(1, member("a"), member("b")))
    assert set(tracker.observe(membership(2, member("a")), 1.0).members) == {"a"}


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


def view_of(names: list[str], replicas: int, epochs: dict[str, int] | None = None) -> ClusterView:
    members = {name: member(name, replicas=replicas, epoch=(epochs or {}).get(name, 0)) for name in names}
    return ClusterView(members, Placement(dict.fromkeys(names, 1.0)))


@given(before=NAMES, after=NAMES, replicas=st.integers(1, 3))
@settings(deadline=None, derandomize=True)
def test_every_new_owner_is_sent_a_segment_by_exactly_one_node_that_held_it(
    before: list[str], after: list[str], replicas: int
) -> None:
    was, now = view_of(before, replicas), view_of(after, replicas)
    for key in KEYS[:10]:
        survivors = [name for name in was.owners(key) if name in after]
        sent = [target for name in survivors for target in Moves(name, [was], now).targets(key)]
        wanted = [name for name in now.owners(key) if name not in survivors] if survivors else []
        assert sorted(sent) == sorted(wanted)


def test_a_node_that_was_restarted_is_sent_its_segments_again_by_the_other_replica() -> None:
    was, now = view_of(["a", "b"], 2), view_of(["a", "b"], 2, {"b": 1})
    assert not is_same_cluster(was, now)
    assert all(Moves("a", [was], now).targets(key) == ["b"] for key in KEYS)
    assert all(Moves("b", [was], now).targets(key) == [] for key in KEYS)


def test_a_node_that_drains_sends_everything_to_the_owners_that_stay() -> None:
    was = view_of(["a", "b", "c"], 2)
    members = {**was.members, "a": replace(was.members["a"], state=NodeState.DRAINING)}
    now = ClusterView(members, Placement({"b": 1.0, "c": 1.0}))
    assert all(sorted(Moves("a", [was], now).targets(key)) == ["b", "c"] for key in KEYS)


def test_nothing_moves_while_nothing_changes() -> None:
    was, now = view_of(["a", "b"], 1), view_of(["b", "a"], 1)
    assert is_same_cluster(was, now)
    assert not any(Moves("a", [was], now).targets(key) for key in KEYS)


def test_pages_written_while_a_node_was_there_that_came_and_went_get_their_second_copy() -> None:
    two, three = view_of(["a", "b"], 2), view_of(["a", "b", "c"], 2)
    for key in KEYS:
        survivor = next(name for name in three.owners(key) if name != "c")
        other = "b" if survivor == "a" else "a"
        wanted = [other] if "c" in three.owners(key) else []
        assert Moves(survivor, [two, three], two).targets(key) == wanted


def test_a_hot_segment_has_two_owners_whom_callers_ask_in_turn() -> None:
    names = ("a", "b", "c")
    hot = KEYS[:20]
    cool = tracked(membership(1, *map(member, names))).view
    view = tracked(membership(1, replace(member("a"), hot=frozenset(hot)), *map(member, names[1:]))).view
    for key in hot:
        assert view.owners(key) == cool.placement.ranked(key)[:2]
        assert [view.holders(key, turn=turn)[0] for turn in range(4)] == view.owners(key) * 2
        assert view.owners(key, set(names) - {view.owners(key)[0]}) == cool.placement.ranked(key)[1:]
    assert all(view.owners(key) == cool.owners(key) == view.holders(key, turn=1) for key in KEYS[20:])


def test_more_copies_than_hot_ones_have_stay_as_they_are() -> None:
    view = tracked(membership(1, *(replace(member(name, replicas=3), hot=frozenset(KEYS)) for name in "abcd"))).view
    assert {len(view.owners(key)) for key in KEYS} == {3}
