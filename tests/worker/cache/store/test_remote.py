"""The REMOTE tier: which errors count as a failure of the store, and which do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from attnstore import DType, PageLayout, block_hashes, namespace
from attnstore.errors import DeadlineExceeded, Unavailable
from attnstore.limits import NODE_FAIR_MS
from attnstore.testing import ManualClock, StoreProcess
from attnstore.types import MatchResult, PageStatus, ReadResult
from attnstore_worker.cache.planning.observation import Observer
from attnstore_worker.cache.store.base import STORE_TRANSPORTS, open_store
from attnstore_worker.cache.store.remote import PAUSE_MS, RemoteTier
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.testing import MemoryStore
from tests.samples import eventually

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=8, block_tokens=4, dtype=DType.FP32)
NAMESPACE = namespace(LAYOUT, model=b"remote")
HASHES = block_hashes(NAMESPACE, range(16), 4)
DEADLINE_MS = 10_000


class NobodyAnswers(MemoryStore):
    """A cluster without an answering node: its calls return an error in the result and do not raise."""

    def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int, deadline_ms: float | None = None
    ) -> MatchResult:
        del namespace, lease_ms, deadline_ms
        self.calls.append("match")
        return MatchResult((0,) * len(prefixes), None, Unavailable("no node is asked"))

    def read(self, _: bytes, hashes: Sequence[bytes], *__: object, **___: object) -> ReadResult:
        return ReadResult((PageStatus.INCOMPLETE,) * len(hashes), 0, DeadlineExceeded("too late"))


class Recorder(Observer):
    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def transferred(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)


def tier(observer: Observer | None = None) -> tuple[RemoteTier, NobodyAnswers]:
    store = NobodyAnswers()
    return RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=DEADLINE_MS, clock=ManualClock(), observer=observer), store


def test_a_match_that_no_node_answered_is_a_failure_and_not_a_store_without_the_pages() -> None:
    recorder = Recorder()
    remote, store = tier(recorder)
    assert remote.match(HASHES).hits == (0,)
    assert remote.statistics().failures == 1
    assert [transfer.failed for transfer in recorder.transfers] == [True]
    assert remote.match(HASHES).hits == (0,)
    assert store.calls.count("match") == 1, "the store is left alone for a while"


@pytest.mark.parametrize(("deadline_ms", "failures"), [(10, 0), (NODE_FAIR_MS - 1, 0), (NODE_FAIR_MS + 1, 1)])
def test_a_read_that_a_planner_hurried_says_nothing_of_the_store(deadline_ms: float, failures: int) -> None:
    remote, _ = tier()
    buffers = [memoryview(bytearray(LAYOUT.page_bytes)) for _ in HASHES]
    assert remote.read(HASHES, buffers, None, deadline_ms=deadline_ms).leading_hits == 0
    assert remote.statistics().failures == failures


class Registered(MemoryStore):
    """A store whose registration takes `took_ms`. `given_ms` records the deadline of each call."""

    def __init__(self, clock: ManualClock, took_ms: float) -> None:
        super().__init__()
        self._clock = clock
        self._took_ms = took_ms
        self.given_ms: list[float | None] = []

    def register_layout(self, namespace: bytes, layout: PageLayout, /, *, deadline_ms: float | None = None) -> int:
        self.given_ms.append(deadline_ms)
        self._clock.advance_ms(self._took_ms)
        return super().register_layout(namespace, layout)

    def read(self, *arguments: Any, deadline_ms: float, **options: Any) -> ReadResult:
        self.given_ms.append(deadline_ms)
        return super().read(*arguments, deadline_ms=deadline_ms, **options)


def test_the_registration_and_the_call_behind_it_share_one_deadline() -> None:
    clock = ManualClock()
    store = Registered(clock, 200)
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=DEADLINE_MS, clock=clock)
    buffers = [memoryview(bytearray(LAYOUT.page_bytes)) for _ in HASHES]
    for _ in range(2):
        remote.read(HASHES, buffers, None, deadline_ms=500)
    assert store.given_ms == [500, 300, 500], "it is registered once"


def test_a_look_up_takes_no_lease_and_counts_each_prefix() -> None:
    store = MemoryStore()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=DEADLINE_MS, clock=ManualClock())
    assert not remote.write(HASHES[:2], [memoryview(bytes(LAYOUT.page_bytes))] * 2).verdicts.count(PageStatus.INCOMPLETE)
    assert remote.look_up([HASHES, HASHES[1:], HASHES[2:], ()]).hits == (2, 1, 0, 0)
    assert store.lease_ms == [0]


def test_a_store_fails_from_a_failure_to_the_next_success() -> None:
    clock, store = ManualClock(), MemoryStore()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=DEADLINE_MS, clock=clock)
    store.failing = ["match"]
    found = remote.look_up([HASHES, HASHES[1:]])
    assert (found.hits, isinstance(found.error, Unavailable)) == ((0, 0), True)
    assert (remote.is_failing, remote.is_paused) == (True, True)
    clock.advance_ms(PAUSE_MS)
    assert (remote.is_failing, remote.is_paused) == (True, False)
    store.failing = ()
    assert remote.look_up([HASHES]).error is None
    assert not remote.is_failing


@pytest.mark.parametrize("transport", STORE_TRANSPORTS)
def test_a_restarted_node_is_told_the_layout_again(transport: str) -> None:
    clock = ManualClock()
    pages = [memoryview(bytes(LAYOUT.page_bytes))] * len(HASHES)
    with StoreProcess("--capacity", "16MiB") as node, open_store(node.url, deadline_ms=5_000, transport=transport) as store:
        remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=5_000, clock=clock)
        assert set(remote.write(HASHES, pages).verdicts) == {PageStatus.STORED}
        node.kill()
        with StoreProcess("--listen", node.address, "--capacity", "16MiB"):

            def counted() -> bool:
                clock.advance_ms(PAUSE_MS)  # a call may meet the broken connection
                return remote.look_up([HASHES]).hits == (0,) and not remote.is_failing

            assert eventually(counted, within_s=30)
            assert set(remote.write(HASHES, pages).verdicts) == {PageStatus.STORED}, "it is empty, and knows the namespace"
            assert remote.look_up([HASHES]).hits == (len(HASHES),)
