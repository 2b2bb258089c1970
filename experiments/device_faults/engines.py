"""Engines on the simulated device, whose tokens are those of an engine on the processor.

Owns: the scenarios of `SCENARIOS`. Invariant: each raises `AssertionError` if a token differs, a block is lost or an access races.
The device counts as one that uses Triton, so steps have persistent tables and tokens are drawn on the device; the kernels are those
of the processor, because interpreted ones take half a second for each step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch

from attnstore.attention import create_attention
from attnstore.core.layout import DType
from attnstore_worker.cache.attending.exchange import DeviceExchange
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.testing import FixedPlanner, MemoryStore, write_tiny_model

_WAIT_MS: Final = 30_000
_BLOCK_TOKENS: Final = 16
_PROMPTS: Final = [[(7 * position + 31 * number) % 900 + 5 for position in range(40 + 16 * number)] for number in range(4)]
_LONG: Final = [(11 * position) % 900 + 5 for position in range(200)]
_HOW: Final = SamplingParams(max_tokens=12)
_LAYERS: Final = LoadPlan(0, 9_999, 9_999, float(_WAIT_MS), FetchOrder.LAYERS)


@cache
def _model() -> LoadedModel:
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        return load_model(Path(folder), DType.FP32)


@cache
def _expected() -> list[list[int]]:
    with Engine(_model(), _options(64)) as engine:
        return [engine.generate(each, _HOW).generated for each in _PROMPTS]


@cache
def _pages() -> dict[bytes, bytes]:
    store = MemoryStore()
    with Engine(_model(), _options(64), store=store) as engine:
        engine.generate_all(_PROMPTS, _HOW)
        assert engine.flush(_WAIT_MS)
    return store.pages


def _filled() -> MemoryStore:
    store = MemoryStore()
    store.pages = dict(_pages())
    return store


def _options(blocks: int, *, host_blocks: int = 0, speculate: bool = False) -> EngineOptions:
    page_bytes = _model().layout(_BLOCK_TOKENS).page_bytes
    return EngineOptions(
        pool_bytes=blocks * page_bytes, host_pool_bytes=host_blocks * page_bytes, chunk_tokens=32, speculate=speculate
    )


def _run(
    device: SimulatedDevice, options: EngineOptions, store: MemoryStore | None = None, *, by_layers: bool = False, rounds: int = 1
) -> None:
    planner = FixedPlanner(_LAYERS) if by_layers else None
    with Engine(_model(), options, store=store, planner=planner, device=device, attention=create_attention("cpu")) as engine:
        for _ in range(rounds):
            sequences = engine.generate_all(_PROMPTS, _HOW)
            assert engine.flush(_WAIT_MS), "pages are still being written"
            engine.check()
            assert [sequence.generated for sequence in sequences] == _expected(), "tokens differ"
        assert engine.statistics().pool.held == 0, "a block is held"
    device.close()
    assert device.races.found == []


def swaps_with_host(device: SimulatedDevice) -> None:
    """Sequences are preempted, and what the pool evicts goes to HOST and comes back."""
    _run(device, _options(12, host_blocks=64), rounds=2)


def loads_from_the_store(device: SimulatedDevice) -> None:
    """Pages that a worker on the processor wrote are read."""
    _run(device, _options(40), _filled())


def loads_by_layers(device: SimulatedDevice) -> None:
    """Steps compute behind pages that arrive layer by layer."""
    _run(device, _options(40), _filled(), by_layers=True)


def writes_to_the_store(device: SimulatedDevice) -> None:
    """A worker on the processor reads the pages that were written."""
    store = MemoryStore()
    _run(device, _options(40), store)
    with Engine(_model(), _options(64), store=store) as engine:
        assert [engine.generate(each, _HOW).generated for each in _PROMPTS] == _expected(), "tokens differ"
        assert engine.statistics().remote.pages_read > 0


def prefills_in_chunks(device: SimulatedDevice) -> None:
    """Chunks that give no token follow each other without a wait of the host for the step."""
    with Engine(_model(), _options(40)) as engine:
        expected = engine.generate(_LONG, _HOW).generated
    with Engine(_model(), _options(40), device=device, attention=create_attention("cpu")) as engine:
        assert engine.generate(_LONG, _HOW).generated == expected, "tokens differ"
    assert device.races.found == []


def drafts_are_verified(device: SimulatedDevice) -> None:
    """Speculation over a pool that is too small for all."""
    _run(device, _options(12, host_blocks=8, speculate=True), rounds=2)


def partials_are_exchanged(device: SimulatedDevice) -> None:
    """A layer's query is sent, and two nodes answer it one after the other."""
    exchange = DeviceExchange(device)
    query = torch.arange(6.0).view(2, 3)
    assert torch.equal(exchange.fetch(query), query), "another query is sent"
    # Merged on the processor's way, because kernels are not interpreted here.
    device.uses_triton = False
    out, lse = torch.zeros(2, 1, 3), torch.full((2, 1), -torch.inf)
    for node in range(2):
        partial = exchange.room("out", 1, 1, 3).fill_(node + 1), exchange.room("lse", 1, 1).zero_()
        exchange.merge(out, lse, partial, torch.tensor([node]))
    assert out[:, 0, 0].tolist() == [1.0, 2.0], "partials differ"
    assert device.races.found == []


SCENARIOS: Final[tuple[Callable[[SimulatedDevice], None], ...]] = (
    swaps_with_host,
    loads_from_the_store,
    loads_by_layers,
    writes_to_the_store,
    prefills_in_chunks,
    drafts_are_verified,
    partials_are_exchanged,
)
"""Each is given a device that uses Triton."""
