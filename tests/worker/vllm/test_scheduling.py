"""The scheduler's half with a store that answers when the test says so."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

from attnstore.errors import Unavailable
from attnstore.testing import ManualClock
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.gate import PROBE_MS, Gate
from attnstore_worker.vllm.identity import page_hashes
from attnstore_worker.vllm.known import KnownPages
from attnstore_worker.vllm.lookups import StoredGroup, StoredSource
from attnstore_worker.vllm.plan import Pages
from attnstore_worker.vllm.scheduling import SchedulerSide
from attnstore_worker.vllm.store_events import BlocksRemoved, Chain, StoreEvents
from tests.samples import eventually
from tests.worker.vllm.answers import CHUNK_TOKENS, FAST, FOREIGN, GROUP, LAYOUT, ROOT, SLOW, TOKENS, Answers, load, settled


def test_a_hit_is_the_stores_prefix_less_what_vllm_has(side: SchedulerSide, store: Answers) -> None:
    assert settled(side, "a") == 6 * TOKENS
    assert settled(side, "b", computed=2 * TOKENS) == 4 * TOKENS
    assert settled(side, "c", computed=7 * TOKENS) == 0
    assert store.asked[0] == page_hashes(ROOT, FOREIGN[:9]), "the last token of the prompt is always computed"


def test_the_last_token_is_never_fetched(side: SchedulerSide, store: Answers) -> None:
    store.pages = 10
    assert settled(side, "a", prompt_tokens=10 * TOKENS) == 9 * TOKENS
    assert settled(side, "b", prompt_tokens=9 * TOKENS + 1) == 9 * TOKENS


def test_the_engine_never_waits_and_a_late_answer_is_a_miss(side: SchedulerSide, store: Answers, clock: ManualClock) -> None:
    store.open.clear()
    assert side.hit_tokens("a", FOREIGN, 160, 0) is None
    clock.advance_ms(99)
    assert side.hit_tokens("a", FOREIGN, 160, 0) is None
    clock.advance_ms(1)
    assert side.hit_tokens("a", FOREIGN, 160, 0) == 0


def test_a_store_that_fails_is_left_alone_until_a_probe_finds_it(side: SchedulerSide, store: Answers, clock: ManualClock) -> None:
    store.error = Unavailable("gone")
    assert [settled(side, name) for name in "ab"] == [0, 0]
    store.error = None
    assert settled(side, "c") == 0
    assert store.asked == [], "nothing was asked for a request"
    clock.advance_ms(10_000)
    for _ in range(1_000_000):
        if side.hit_tokens(f"d{_}", FOREIGN, 160, 0) != 0:
            break
    assert settled(side, "e") == 6 * TOKENS


def test_requests_that_do_not_wait_long_do_not_make_the_store_a_dead_one(
    side: SchedulerSide, store: Answers, clock: ManualClock
) -> None:
    store.open.clear()
    for calls, request in enumerate("ab", 1):
        assert side.hit_tokens(request, FOREIGN, 160, 0) is None
        assert eventually(lambda calls=calls: store.begun == calls)
        clock.advance_ms(100)
        assert side.hit_tokens(request, FOREIGN, 160, 0) == 0
    store.open.set()
    assert settled(side, "c") == 6 * TOKENS


def test_a_store_whose_late_answers_turn_out_to_be_errors_is_left_alone(
    side: SchedulerSide, tier: RemoteTier, store: Answers, clock: ManualClock
) -> None:
    store.open.clear()
    store.error = Unavailable("gone")
    for calls, request in enumerate("ab", 1):
        assert side.hit_tokens(request, FOREIGN, 160, 0) is None
        assert eventually(lambda calls=calls: store.begun == calls)
        clock.advance_ms(100)
        assert side.hit_tokens(request, FOREIGN, 160, 0) == 0
    store.open.set()
    assert eventually(lambda: tier.is_failing)
    store.error = None
    assert settled(side, "d") == 0
    assert store.asked == [], "nothing was asked for a request"


def test_a_fetch_that_would_be_slower_than_computing_is_not_claimed(side: SchedulerSide) -> None:
    side.learn(SLOW)
    assert settled(side, "a") == 0


def test_a_load_that_takes_too_long_is_cut_to_its_leading_part(side: SchedulerSide) -> None:
    names = page_hashes(ROOT, FOREIGN)
    side.learn([load(1 << 20, 4_000 / 3 * (1 << 20) / LAYOUT.page_bytes)] * 96)
    side.learn([Step(0.0, 1_000_000.0, ((0, 1000),))] * 96)
    assert settled(side, "a", computed=TOKENS) == 3 * TOKENS, "three pages come in 4 s, a fourth would come after 5"
    side.allocated("a", [range(20, 30)], 3 * TOKENS)
    assert loaded_names(side) == [("a", list(zip(range(21, 24), names[1:4], strict=True)))]
    assert side.scheduled("a", [range(20, 30)], tokens_after=6 * TOKENS, restarted=True) == [], "the store has those after them too"


def test_without_a_measurement_of_the_link_nothing_is_claimed(unmeasured: SchedulerSide) -> None:
    assert settled(unmeasured, "a") == 0


def test_loads_and_saves_name_each_block_once(side: SchedulerSide) -> None:
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a", computed=TOKENS) == 5 * TOKENS
    side.allocated("a", [list(range(20, 30))], 5 * TOKENS)
    assert loaded_names(side) == [("a", list(zip(range(21, 26), names[1:6], strict=True)))]
    assert loaded_names(side) == []
    saves = side.scheduled("a", [list(range(20, 30))], tokens_after=8 * TOKENS + 3, restarted=True)
    assert named(saves) == [(26, names[6]), (27, names[7])]
    saves = side.scheduled("a", [[]], tokens_after=9 * TOKENS, restarted=False)
    assert named(saves) == [(28, names[8])]


def named(saves: Iterable[Pages]) -> list[tuple[int, bytes]]:
    """Returns the blocks and their pages' names."""
    return [pair for pages in saves for pair in zip(pages.block_ids, pages.names, strict=True)]


def loaded_names(side: SchedulerSide) -> list[tuple[str, list[tuple[int, bytes]]]]:
    """Returns what the next step loads: each request's blocks and their pages' names."""
    return [(load.request_id, named(load.parts)) for load in side.step([], ()).loads]


def test_a_load_is_the_same_in_the_workers_process(side: SchedulerSide) -> None:
    assert settled(side, "a", computed=TOKENS) == 5 * TOKENS
    side.allocated("a", [[70_000 * index for index in range(10)]], 5 * TOKENS)
    plan = side.step([Pages(0, [b"3" * 32], [3])], ((0, 5),))
    sent = pickle.loads(pickle.dumps(plan))
    assert (named(sent.saves), sent.chunks) == (named(plan.saves), plan.chunks)
    (load,), (other,) = plan.loads, sent.loads
    (pages,), (others,) = load.parts, other.parts
    assert (other.request_id, others.group, list(others.names)) == (load.request_id, pages.group, list(pages.names))
    assert list(others.block_ids) == list(pages.block_ids)
    assert list(others.blocks_of(range(1, 3))) == list(pages.block_ids[1:3])


def test_a_hit_for_which_vllm_had_no_blocks_is_a_hit_when_it_has(side: SchedulerSide, store: Answers) -> None:
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a") == 6 * TOKENS
    assert loaded_names(side) == [], "the pool was full: nothing was allocated"
    assert [side.hit_tokens("a", FOREIGN, 160, 0) for _ in range(3)] == [6 * TOKENS] * 3
    assert len(store.asked) == 1, "the store is asked once"
    side.allocated("a", [list(range(20, 30))], 6 * TOKENS)
    assert loaded_names(side) == [("a", list(zip(range(20, 26), names[:6], strict=True)))]


def test_what_vllm_has_itself_may_change_while_a_request_waits_for_blocks(side: SchedulerSide) -> None:
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a", computed=3 * TOKENS) == 3 * TOKENS
    assert settled(side, "a", computed=7 * TOKENS) == 0
    assert settled(side, "a", computed=TOKENS) == 5 * TOKENS, "vLLM has evicted two blocks of it"
    side.allocated("a", [list(range(20, 30))], 5 * TOKENS)
    assert loaded_names(side) == [("a", list(zip(range(21, 26), names[1:6], strict=True)))]


def test_a_miss_is_a_miss_however_often_it_is_asked_for(side: SchedulerSide, store: Answers, clock: ManualClock) -> None:
    store.open.clear()
    assert side.hit_tokens("a", FOREIGN, 160, 0) is None
    assert eventually(lambda: store.begun == 1)
    clock.advance_ms(100)
    assert [side.hit_tokens("a", FOREIGN, 160, 0) for _ in range(3)] == [0, 0, 0]
    store.open.set()
    assert settled(side, "b") == 6 * TOKENS, "one late answer is no reason to leave the store alone"
    assert eventually(lambda: len(store.asked) == 2)
    assert side.hit_tokens("a", FOREIGN, 160, 0) == 0
    assert store.begun == 2, "it was looked up once"


def test_a_request_whose_load_failed_is_not_loaded_again(side: SchedulerSide) -> None:
    assert settled(side, "a") == 6 * TOKENS
    side.allocated("a", [list(range(20, 30))], 6 * TOKENS)
    side.failed({20, 21, 22, 23, 24, 25})
    assert side.hit_tokens("a", FOREIGN, 160, 0) == 0, "vLLM took its blocks back and asks as for a new request"
    side.allocated("a", [list(range(20, 30))], 0)
    saves = side.scheduled("a", [range(20, 30)], tokens_after=160, restarted=True)
    assert [block for block, _ in named(saves)] == list(range(20, 30))


def test_a_request_that_is_preempted_may_load_again(side: SchedulerSide, store: Answers) -> None:
    assert settled(side, "a") == 6 * TOKENS
    side.allocated("a", [list(range(20, 30))], 6 * TOKENS)
    assert len(loaded_names(side)) == 1
    side.allocated("a", [list(range(20, 30))], 0)  # vLLM passes the blocks of the tokens to be computed
    side.scheduled("a", [list(range(20, 30))], tokens_after=8 * TOKENS, restarted=True)
    assert side.hit_tokens("a", FOREIGN, 160, 0) == 0, "it has blocks"
    side.preempted("a")
    side.failed({22})  # the block belongs to another request now
    store.pages = 3
    assert settled(side, "a") == 3 * TOKENS
    assert settled(side, "a") == 3 * TOKENS, "the pool is still full"
    side.allocated("a", [list(range(40, 50))], 3 * TOKENS)
    assert [[block for block, _ in blocks] for _, blocks in loaded_names(side)] == [[40, 41, 42]]


def test_a_request_that_ends_before_it_has_blocks_loads_nothing(side: SchedulerSide, store: Answers) -> None:
    assert settled(side, "a") == 6 * TOKENS
    side.finished("a")
    assert loaded_names(side) == []
    assert side.scheduled("a", [[1]], tokens_after=TOKENS, restarted=True) == []
    store.pages = 2
    assert settled(side, "a") == 2 * TOKENS, "another request of that name is asked about anew"


def test_a_link_that_was_bad_is_measured_again_and_used_again(side: SchedulerSide, clock: ManualClock) -> None:
    side.learn(SLOW)
    assert settled(side, "first", prompt_tokens=100) == 0
    assert not side.wants_probe, "it was measured just now"
    clock.advance_ms(PROBE_MS + 1)
    assert side.wants_probe
    side.learn(FAST)
    assert not side.wants_probe
    assert settled(side, "second", prompt_tokens=100) == 96


def test_a_link_that_was_never_measured_is_measured_when_a_hit_was_not_claimed(unmeasured: SchedulerSide) -> None:
    assert not unmeasured.wants_probe
    assert settled(unmeasured, "first", prompt_tokens=100) == 0
    assert unmeasured.wants_probe


def saved_names(side: SchedulerSide, request: str, blocks: int) -> list[bytes]:
    """Returns the names that a step would save if it completes that many blocks of a request, all of them computed or in vLLM's own
    cache.
    """
    return [name for _, name in named(side.scheduled(request, [range(blocks)], tokens_after=blocks * TOKENS, restarted=True))]


def test_a_block_that_vllm_still_has_is_not_sent_a_second_time(side: SchedulerSide, store: Answers) -> None:
    store.pages = 0
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a") == 0
    assert saved_names(side, "a", 8) == names[:8]
    assert settled(side, "b", computed=9 * TOKENS) == 0, "vLLM has it all: the store is not asked"
    assert saved_names(side, "b", 10) == names[8:]


def test_pages_that_the_store_has_lost_are_saved_again(side: SchedulerSide, store: Answers) -> None:
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a") == 6 * TOKENS
    assert saved_names(side, "a", 8) == names[6:8]
    store.pages = 2
    assert settled(side, "b", computed=2 * TOKENS) == 0
    assert saved_names(side, "b", 8) == names[2:8]


def test_blocks_that_were_not_loaded_are_saved_when_they_are_computed(side: SchedulerSide) -> None:
    names = page_hashes(ROOT, FOREIGN)
    assert settled(side, "a", computed=TOKENS) == 5 * TOKENS
    side.allocated("a", [list(range(20, 30))], 5 * TOKENS)
    side.failed({23, 24, 25})
    saves = side.scheduled("a", [list(range(20, 30))], tokens_after=7 * TOKENS, restarted=True)
    assert named(saves) == list(zip(range(23, 27), names[3:7], strict=True))


def test_events_follow_what_is_found_saved_and_lost(tier: RemoteTier, gate: Gate, store: Answers, clock: ManualClock) -> None:
    told = StoreEvents(TOKENS)
    side = SchedulerSide(
        [StoredSource([StoredGroup(GROUP, ROOT, tier)])], gate, clock, lookup_ms_max=100, chunk_tokens=CHUNK_TOKENS, events=told
    )
    names, chain = page_hashes(ROOT, FOREIGN), Chain(FOREIGN, range(160))
    side.arrived("a", FOREIGN, 160, chain)
    settled(side, "a")
    assert [event.block_hashes for event in told.take()] == [tuple(FOREIGN[:6])]
    saved_names(side, "a", 8)
    told.written(names[6:8])
    assert [event.block_hashes for event in told.take()] == [(FOREIGN[6],), (FOREIGN[7],)]
    store.pages = 7
    side.arrived("b", FOREIGN, 160, chain)
    settled(side, "b")
    assert told.take() == [BlocksRemoved((FOREIGN[7],))]
    store.error = Unavailable("gone")
    side.arrived("c", FOREIGN, 160, chain)
    assert eventually(lambda: tier.is_failing)
    store.error = None
    clock.advance_ms(10_000)
    tier.look_up([names])
    settled(side, "c")
    assert told.take() == [], "a store that does not answer may have all of them"
    side.close()


def test_a_vllm_that_cannot_go_on_after_a_prefix_gets_all_tokens_but_the_last_or_none(
    tier: RemoteTier, gate: Gate, clock: ManualClock
) -> None:
    sources = [StoredSource([StoredGroup(GROUP, ROOT, tier)])]
    side = SchedulerSide(sources, gate, clock, lookup_ms_max=100, chunk_tokens=CHUNK_TOKENS, continues=False)
    side.learn(FAST)
    assert settled(side, "a", prompt_tokens=6 * TOKENS + 1) == 6 * TOKENS
    assert settled(side, "b", prompt_tokens=6 * TOKENS + 2) == 0, "two tokens would be computed without those before them"
    assert settled(side, "c", prompt_tokens=7 * TOKENS + 1) == 0
    side.learn([load(1 << 20, 4_000 / 3 * (1 << 20) / LAYOUT.page_bytes)] * 96)
    side.learn([Step(0.0, 1_000_000.0, ((0, 1000),))] * 96)
    assert settled(side, "d", prompt_tokens=6 * TOKENS + 1) == 0, "a link that is too slow for all of it"
    side.close()


def test_only_the_latest_names_are_remembered() -> None:
    known = KnownPages(names_max=3)
    known.add([b"a", b"b", b"c"])
    known.add([b"a", b"d"])
    assert [name for name in (b"a", b"b", b"c", b"d") if name in known] == [b"a", b"c", b"d"]
