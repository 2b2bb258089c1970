"""The REMOTE tier: what counts as a failure of the store, and what does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from attnstore import DType, PageLayout, block_hashes, namespace
from attnstore.errors import DeadlineExceeded, Unavailable
from attnstore.limits import NODE_FAIR_MS
from attnstore.testing import ManualClock
from attnstore.types import MatchResult, PageStatus, ReadResult
from attnstore_worker.cache.planning.observation import Observer, Transfer
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.testing import MemoryStore

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=8, block_tokens=4, dtype=DType.FP32)
NAMESPACE = namespace(LAYOUT, model=b"remote")
HASHES = block_hashes(NAMESPACE, range(16), 4)
DEADLINE_MS = 10_000


class NobodyAnswers(MemoryStore):
    """A cluster of which no node answers: its calls say so and raise nothing."""

    def match(self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int) -> MatchResult:
        del namespace, lease_ms
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
