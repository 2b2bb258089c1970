"""What routers are told of the store: each block once, with what they need to hash it, until it is gone."""

from __future__ import annotations

from attnstore_worker.vllm.store_events import BlocksRemoved, BlocksStored, Chain, StoreEvents

TOKENS = 4
HASHES = [bytes((index,)) * 32 for index in range(8)]
NAMES = [b"name" + each for each in HASHES]
CHAIN = Chain(HASHES, range(100, 140), "salt")


def stored(begin: int, end: int) -> BlocksStored:
    parent = HASHES[begin - 1] if begin else None
    return BlocksStored(tuple(HASHES[begin:end]), parent, tuple(range(100 + 4 * begin, 100 + 4 * end)), None if begin else "salt")


def test_what_a_look_up_finds_is_announced_once_in_runs() -> None:
    events = StoreEvents(TOKENS)
    events.found(CHAIN, NAMES[:3], 2)
    assert events.take() == [stored(0, 2)]
    events.found(CHAIN, NAMES, 5)
    assert events.take() == [stored(2, 5)]
    events.found(CHAIN, NAMES, 5)
    assert events.take() == []


def test_a_block_is_announced_when_its_page_was_written_and_not_before() -> None:
    events = StoreEvents(TOKENS)
    events.saving(CHAIN, [(3, NAMES[3]), (6, NAMES[6])])
    assert events.take() == []
    events.written([NAMES[6], b"another engine's", NAMES[3]])
    events.written([NAMES[3]])
    assert events.take() == [stored(6, 7), stored(3, 4)]
    events.found(CHAIN, NAMES, 8)
    assert events.take() == [stored(0, 3), stored(4, 6), stored(7, 8)], "the rest, in runs"


def test_a_page_that_was_found_while_it_was_written_is_announced_once() -> None:
    events = StoreEvents(TOKENS)
    events.saving(CHAIN, [(0, NAMES[0])])
    events.found(CHAIN, NAMES[:1], 1)
    events.written(NAMES[:1])
    assert events.take() == [stored(0, 1)]


def test_what_a_look_up_misses_is_withdrawn_once_if_it_was_announced() -> None:
    events = StoreEvents(TOKENS)
    events.found(CHAIN, NAMES[:4], 4)
    events.found(CHAIN, NAMES, 1)
    events.found(CHAIN, NAMES, 1)
    assert events.take() == [stored(0, 4), BlocksRemoved(tuple(HASHES[1:4]))]
    events.found(CHAIN, NAMES, 3)
    assert events.take() == [stored(1, 3)], "the store has them again"


def test_the_oldest_of_many_blocks_are_withdrawn() -> None:
    events = StoreEvents(TOKENS, announced_max=3, saving_max=2)
    events.found(CHAIN, NAMES, 5)
    assert events.take() == [stored(0, 5), BlocksRemoved(tuple(HASHES[:2]))]
    events.saving(CHAIN, [(index, NAMES[index]) for index in (5, 6, 7)])
    events.written(NAMES[5:])
    assert events.take() == [stored(6, 7), stored(7, 8), BlocksRemoved(tuple(HASHES[2:4]))], "the first was forgotten"
