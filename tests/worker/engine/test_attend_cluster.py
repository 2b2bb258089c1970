"""Blocks that stay on the nodes of a cluster: any node may answer for any of them, and nodes come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import attnstore
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, FinishReason, SamplingParams
from attnstore_worker.model import LoadedModel
from tests.cluster.conftest import Cluster

pytestmark = pytest.mark.redis

BLOCK_TOKENS = 2
"""So small that the tiny model's context of 512 tokens has four segments."""
NEW_TOKENS = 24
PROMPT = [(7 * index * index + 13 * index) % 4096 + 10 for index in range(480)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster("ada", "bob", "cleo", options=("--attend-threads", "1", "--replicas", "2"))
    yield cluster
    cluster.close()


def options(model: LoadedModel, pool_blocks: int, attend: AttendPolicy) -> EngineOptions:
    pool_bytes = pool_blocks * model.layout(BLOCK_TOKENS).page_bytes
    return EngineOptions(pool_bytes=pool_bytes, block_tokens=BLOCK_TOKENS, chunk_tokens=32, attend=attend, store_deadline_ms=20_000)


def resident(model: LoadedModel) -> list[int]:
    with Engine(model, options(model, 256, AttendPolicy.NEVER)) as engine:
        return engine.generate(PROMPT, SamplingParams(max_tokens=NEW_TOKENS)).generated


def test_the_nodes_of_a_cluster_answer_together_and_one_that_is_killed_costs_no_token(tiny: LoadedModel, cluster: Cluster) -> None:
    expected = resident(tiny)
    with (
        attnstore.connect(cluster.url, deadline_ms=20_000, transport="tcp") as store,
        Engine(tiny, options(tiny, 64, AttendPolicy.BEYOND_POOL), store=store) as engine,
    ):
        sequence = engine.submit(PROMPT, SamplingParams(max_tokens=NEW_TOKENS))
        while len(sequence.generated) < NEW_TOKENS // 2:
            engine.step()
        before = engine.attending()
        assert before is not None
        assert before.pages_open > 64
        assert before.losses == 0
        assert before.rows > before.round_trips, "several nodes are asked at once"
        cluster.kill("bob")
        while sequence.finish_reason is None:
            engine.step()
        after = engine.attending()
        assert after is not None
        assert after.losses > 0
        assert (sequence.finish_reason, sequence.generated) == (FinishReason.LENGTH, expected)
