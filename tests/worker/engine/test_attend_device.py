"""Attended blocks with a device between the model and the sockets: the tokens are the same, and each wait is necessary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnstore
from attnstore.testing import StoreProcess
from attnstore_worker.cache.attending.exchange import DeviceExchange
from attnstore_worker.device.base import Wait
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel

NEW_TOKENS = 12
POOL_BLOCKS = 8
PROMPTS = [[(7 * index * index + 13 * index + seed) % 4096 + 10 for index in range(200)] for seed in (0, 5)]
"""Each has 12 complete blocks, more than the pool."""


@pytest.fixture(scope="module")
def client() -> Iterator[attnstore.Client]:
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node,
        attnstore.connect(node.url, transport="tcp", deadline_ms=60_000) as client,
    ):
        yield client


def engine_on(device: SimulatedDevice, model: LoadedModel, client: attnstore.Client) -> Engine:
    options = EngineOptions(
        pool_bytes=POOL_BLOCKS * model.layout(16).page_bytes,
        chunk_tokens=32,
        attend=AttendPolicy.BEYOND_POOL,
        store_deadline_ms=60_000,
    )
    return Engine(model, options, store=client, device=device)


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_queries_and_partials_pass_through_pinned_memory_and_the_tokens_are_the_same(
    tiny: LoadedModel, client: attnstore.Client, schedule: Schedule
) -> None:
    with Engine(tiny, EngineOptions(pool_bytes=64 * tiny.layout(16).page_bytes, chunk_tokens=32)) as resident:
        expected = [resident.generate(each, SamplingParams(max_tokens=NEW_TOKENS)).generated for each in PROMPTS]
    device = SimulatedDevice(schedule)
    with engine_on(device, tiny, client) as engine:
        got = [engine.generate(each, SamplingParams(max_tokens=NEW_TOKENS)).generated for each in PROMPTS]
        engine.check()
        counts = engine.attending()
        assert counts is not None
        assert counts.round_trips > NEW_TOKENS
        assert engine.flush(60_000)
        assert engine.statistics().pool.held == 0
    device.close()
    assert got == expected
    assert device.races.found == []


def test_without_its_wait_a_query_is_sent_before_it_is_there(tiny: LoadedModel, client: attnstore.Client) -> None:
    device = SimulatedDevice("late", without=Wait.QUERY_AFTER_COMPUTE)
    with engine_on(device, tiny, client) as engine, pytest.raises(Unsynchronised, match="the host reads is not ordered"):
        engine.generate(PROMPTS[0], SamplingParams(max_tokens=NEW_TOKENS))


def test_the_partial_of_a_second_node_waits_until_the_first_ones_was_copied() -> None:
    assert merged_twice(SimulatedDevice("late")) == [1.0, 2.0]
    with pytest.raises(Unsynchronised, match="the host writes is not ordered"):
        merged_twice(SimulatedDevice("late", without=Wait.PARTIAL_AFTER_MERGE))


def merged_twice(device: SimulatedDevice) -> list[float]:
    """Returns the rows after two partials that are received into the same memory, one after the other, and merged."""
    exchange = DeviceExchange(device)
    out, lse = torch.zeros(2, 1, 1), torch.full((2, 1), -torch.inf)
    for row, value in enumerate((1.0, 2.0)):
        part = exchange.room("out", 1, 1, 1).fill_(value), exchange.room("lse", 1, 1).zero_()
        exchange.merge(out, lse, part, torch.tensor([row]))
    return [float(value) for value in out.flatten()]
