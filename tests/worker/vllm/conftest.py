"""The scheduler's half, with a store that answers when the test says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from attnstore.limits import NODE_FAIR_MS
from attnstore.testing import ManualClock
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.lookups import StoredGroup, StoredSource
from attnstore_worker.vllm.scheduling import SchedulerSide
from tests.worker.vllm.answers import CHUNK_TOKENS, FAST, GROUP, LAYOUT, ROOT, Answers


@pytest.fixture
def store() -> Answers:
    return Answers()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def gate(clock: ManualClock) -> Gate:
    return Gate(clock, load_ms_max=5_000)


@pytest.fixture
def tier(store: Answers, clock: ManualClock, gate: Gate) -> RemoteTier:
    return RemoteTier(cast("PageStore", store), ROOT, LAYOUT, deadline_ms=NODE_FAIR_MS, clock=clock, observer=gate)


@pytest.fixture
def unmeasured(store: Answers, tier: RemoteTier, gate: Gate, clock: ManualClock) -> Iterator[SchedulerSide]:
    side = SchedulerSide(
        [StoredSource([StoredGroup(GROUP, ROOT, tier)])], gate, clock, lookup_ms_max=100, chunk_tokens=CHUNK_TOKENS
    )
    yield side
    store.open.set()
    side.close()


@pytest.fixture
def side(unmeasured: SchedulerSide) -> SchedulerSide:
    unmeasured.learn(FAST)
    return unmeasured
