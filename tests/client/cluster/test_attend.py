"""Which node is asked about which page, what is kept at a node, and what the loss of a node costs, over scripted nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from attnstore import BlockHash, Lease, MatchResult, PageLayout, errors
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendPlan
from attnstore.client.calls import Runner
from attnstore.client.cluster.attend import AttendNode, StoreAttention
from attnstore.client.cluster.division import distribute
from attnstore.client.facade import LoopThread
from attnstore.clock import Deadline, MonotonicClock
from attnstore.wire.attend import AttendShape
from tests.samples import SMALL, eventually

PAGES = 6
HASHES = [BlockHash(bytes([index]) * 32) for index in range(PAGES)]
WITHIN_MS = 20_000.0


class Stream:
    """A node's stream; `log` is what all streams of a test did, in order."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.closed = False
        self.sets: dict[int, list[bytes]] = {}

    def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        assert lease == self._node.lease
        self._node.log.append(f"{self._node.name} is asked to open")
        self.sets[len(self.sets)] = list(hashes)
        return len(self.sets) - 1

    def receive_opened(self, _: int) -> None:
        self._node.log.append(f"{self._node.name} has opened")
        if self._node.refusal is not None:
            raise self._node.refusal

    def close_set(self, set_id: int) -> None:
        del self.sets[set_id]

    def close(self) -> None:
        self.closed = True
        self.sets.clear()


class Node:
    """A node, and its client: holds the pages of these indices."""

    def __init__(self, name: str, held: set[int], log: list[str], met: asyncio.Barrier | None = None) -> None:
        self.name = name
        self.held = {HASHES[index] for index in held}
        self.log = log
        self.lease = Lease(name.encode().ljust(16, b"."), 60_000)
        self.leases = 0
        self.failure: Exception | None = None
        self.refusal: errors.AttnStoreError | None = None
        self.unreachable: errors.AttnStoreError | None = None
        self.streams: list[Stream] = []
        self._met = met

    async def call(self, call: Callable[[AsyncClient], Awaitable[Any]], /) -> Any:
        return await call(cast(AsyncClient, self))

    async def register(self, namespace: bytes, layout: PageLayout, deadline: Deadline, /) -> None:
        pass

    async def match(self, _: bytes, prefixes: Sequence[Sequence[bytes]], **__: float) -> MatchResult:
        if self._met is not None:
            async with asyncio.timeout(WITHIN_MS / 1e3):
                await self._met.wait()
        if self.failure is not None:
            raise self.failure
        hits = tuple(int(page_hash in self.held) for (page_hash,) in prefixes)
        self.leases += any(hits)
        return MatchResult(hits, self.lease if any(hits) else None)

    async def release(self, lease: Lease, **_: float) -> bool:
        assert lease == self.lease
        self.leases -= 1
        return True

    async def attend(self, _plan: AttendPlan, _run: Runner, /) -> Stream:
        if self.unreachable is not None:
            raise self.unreachable
        self.streams.append(Stream(self))
        return self.streams[-1]

    @property
    def sets(self) -> list[list[bytes]]:
        return [hashes for stream in self.streams for hashes in stream.sets.values()]


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    yield LoopThread.acquire()
    LoopThread.release()


def attention(loop: LoopThread, *nodes: Node) -> StoreAttention:
    """Over nodes that may hold any page."""

    async def holders(hashes: Sequence[bytes], _: Deadline) -> Mapping[AttendNode, Sequence[int]]:
        return dict.fromkeys(nodes, range(len(hashes)))

    plan = AttendPlan(AttendShape(bytes(32), 4, 0.5), SMALL, WITHIN_MS, MonotonicClock())
    return StoreAttention(plan, holders, loop)


def test_nodes_are_asked_at_the_same_time_for_their_pages_and_for_their_sets(loop: LoopThread) -> None:
    log: list[str] = []
    met = asyncio.Barrier(3)
    nodes = [Node(name, {0, 1, 2, 3, 4, 5}, log, met) for name in ("ada", "bob", "cleo")]
    with attention(loop, *nodes) as over:
        assert over.open(HASHES) is not None
    assert log == [f"{name} {did}" for did in ("is asked to open", "has opened") for name in ("ada", "bob", "cleo")]


def test_each_page_is_in_one_set_and_nodes_that_hold_the_same_share_the_work(loop: LoopThread) -> None:
    ada, bob = Node("ada", set(range(6)), []), Node("bob", set(range(6)), [])
    with attention(loop, ada, bob) as over:
        prefix = over.open(HASHES)
        assert prefix is not None
        assert prefix.blocks == PAGES
        assert sorted([*ada.sets[0], *bob.sets[0]]) == HASHES
        assert [len(node.sets[0]) for node in (ada, bob)] == [3, 3]


def test_the_prefix_ends_at_the_first_page_that_no_node_has(loop: LoopThread) -> None:
    ada, bob = Node("ada", {0, 1, 4, 5}, []), Node("bob", {2, 5}, [])
    with attention(loop, ada, bob) as over:
        prefix = over.open(HASHES)
        assert prefix is not None
        assert prefix.blocks == 3
        assert (ada.sets, bob.sets) == ([HASHES[:2]], [HASHES[2:3]])


def test_a_page_goes_to_a_node_that_has_it_and_shares_are_equal() -> None:
    assert distribute([{0, 1, 2, 3}, {1, 2, 3, 5}], 6) == [[0, 1], [2, 3]]
    assert distribute([], 3) == []


def test_a_node_that_alone_has_pages_gets_fewer_of_those_that_others_have_too() -> None:
    assert distribute([range(8), range(4)], 8) == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_hundreds_of_nodes_with_two_replicas_of_each_segment_get_equal_shares() -> None:
    nodes, segment = 200, 64
    present: list[list[int]] = [[] for _ in range(nodes)]
    for first in range(0, nodes * segment, segment):
        for node in (first // segment, first // segment + 1):
            present[node % nodes].extend(range(first, first + segment))
    held = distribute(present, nodes * segment)
    assert sorted(index for indices in held for index in indices) == list(range(nodes * segment))
    assert all(set(indices) <= set(there) for indices, there in zip(held, present, strict=True))
    assert max(map(len, held)) == segment


def test_nothing_is_kept_at_a_node_where_nothing_was_found_or_needed(loop: LoopThread) -> None:
    ada, bob = Node("ada", set(), []), Node("bob", {3}, [])
    with attention(loop, ada, bob) as over:
        assert over.open(HASHES) is None
        assert eventually(lambda: bob.leases == 0)
        assert not ada.streams
        assert not bob.streams


def test_a_node_that_does_not_answer_holds_nothing(loop: LoopThread) -> None:
    ada, bob = Node("ada", set(range(6)), []), Node("bob", set(range(6)), [])
    bob.failure = errors.Unavailable("gone")
    with attention(loop, ada, bob) as over:
        assert over.open(HASHES) is not None
        assert ada.sets == [HASHES]


def test_a_node_that_opens_no_set_loses_its_prefixes_and_no_other_and_every_lease_is_released(loop: LoopThread) -> None:
    ada, bob = Node("ada", {0, 1}, []), Node("bob", {2, 3}, [])
    with attention(loop, ada, bob) as over:
        first, both = over.open(HASHES[:2]), over.open(HASHES)
        assert first is not None
        assert both is not None
        bob.refusal = errors.Overloaded("pages of attended sets")
        with pytest.raises(errors.Overloaded):
            over.open(HASHES)
        assert (first.lost, both.lost) == (False, True)
        assert ada.sets == [HASHES[:2], HASHES[:2]]
        over.close_prefix(both)
        assert ada.sets == [HASHES[:2]]
        assert eventually(lambda: (ada.leases, bob.leases) == (1, 0))
        bob.refusal = None
        again = over.open(HASHES)
        assert again is not None
        assert not again.lost
        assert len(bob.streams) == 2


def test_a_failure_that_nobody_foresaw_keeps_no_lease(loop: LoopThread) -> None:
    ada, bob = Node("ada", {0, 1}, []), Node("bob", {2, 3}, [])
    bob.attend = lambda *_: 1 // 0  # type: ignore[method-assign]
    with attention(loop, ada, bob) as over:
        with pytest.raises(ZeroDivisionError):
            over.open(HASHES)
        assert eventually(lambda: (ada.leases, bob.leases) == (0, 0))


def test_one_stream_serves_all_prefixes_of_a_node_and_closes_with_the_last(loop: LoopThread) -> None:
    ada = Node("ada", set(range(6)), [])
    with attention(loop, ada) as over:
        first, second = over.open(HASHES), over.open(HASHES[:2])
        assert first is not None
        assert second is not None
        (stream,) = ada.streams
        over.close_prefix(first)
        assert not stream.closed
        assert ada.sets == [HASHES[:2]]
        over.close_prefix(second)
        assert stream.closed
        assert eventually(lambda: ada.leases == 0)


def test_closing_closes_every_stream_and_releases_every_lease(loop: LoopThread) -> None:
    ada, bob = Node("ada", {0, 1}, []), Node("bob", {2, 3}, [])
    over = attention(loop, ada, bob)
    prefix = over.open(HASHES)
    assert prefix is not None
    over.close()
    assert prefix.lost
    assert eventually(lambda: (ada.leases, bob.leases) == (0, 0))


def test_pages_of_a_node_to_which_no_stream_opens_are_attended_to_at_their_other_holder(loop: LoopThread) -> None:
    log: list[str] = []
    nodes = [Node("a", {0, 1, 2, 3}, log), Node("b", {2, 3, 4, 5}, log), Node("c", {0, 1, 4}, log)]
    nodes[0].unreachable = errors.Unavailable("a is gone")
    with attention(loop, *nodes) as asked:
        prefix = asked.open(HASHES)
        assert prefix is not None
        assert prefix.blocks == PAGES
        assert nodes[0].sets == []
        assert sorted(page for node in nodes[1:] for pages in node.sets for page in pages) == sorted(HASHES)
        assert eventually(lambda: nodes[0].leases == 0)
        asked.close_prefix(prefix)
    assert eventually(lambda: not any(node.leases for node in nodes))


def test_pages_that_only_an_unreachable_node_has_end_the_prefix_and_without_any_node_its_error_is_raised(loop: LoopThread) -> None:
    log: list[str] = []
    nodes = [Node("a", {2, 3}, log), Node("b", {0, 1, 4, 5}, log)]
    nodes[0].unreachable = errors.Overloaded("a has no place")
    with attention(loop, *nodes) as asked:
        prefix = asked.open(HASHES)
        assert prefix is not None
        assert prefix.blocks == 2
        nodes[1].unreachable = errors.Unavailable("b is gone")
        asked.close_prefix(prefix)
        with pytest.raises(errors.AttnStoreError, match=r"gone|no place"):
            asked.open(HASHES)
    assert eventually(lambda: not any(node.leases for node in nodes))
