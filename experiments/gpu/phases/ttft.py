"""Time to the first token by tier, beside what the planner's costs forecast, and what a swap-in costs the decodes beside it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from attnstore.clock import MonotonicClock
from attnstore.core.layout import DType
from attnstore.testing import StoreProcess
from attnstore_worker.cache import CostPlanner, PageStore, Tier, open_store
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.random_models import SMOLLM2_135M, random_model
from experiments.gpu import targets
from experiments.gpu.phase import Phase

_BLOCK_TOKENS = 16
_CHUNK_TOKENS = 512
_DEADLINE_MS = 30_000
_TURNS = 3
_DECODES = 4
_DECODE_BLOCKS = 16
_STEPS = 30
_STEPS_MAX = 4_000


def run(phase: Phase) -> None:
    """Measures a prompt of 8k tokens that is computed, in HOST, or at a node of this machine."""
    shape, tokens = SMOLLM2_135M, 8_000
    if phase.quick:
        shape, tokens = shape._replace(layers=2, hidden=192, intermediate=256, q_heads=3, kv_heads=1, vocabulary=512), 200
    model = random_model(shape, DType.BF16, phase.device)
    blocks = 2 * (tokens // _BLOCK_TOKENS + 2) + _DECODES * _DECODE_BLOCKS
    pool_bytes = blocks * model.layout(_BLOCK_TOKENS).page_bytes
    options = EngineOptions(pool_bytes=pool_bytes, host_pool_bytes=2 * pool_bytes, chunk_tokens=_CHUNK_TOKENS)
    prompts = [[(at * 7 + number) % 500 + 5 for at in range(tokens)] for number in range(1 + _TURNS)]
    # It learns of all engines, and plans for none of them: each tier is used as it is.
    planner = CostPlanner(MonotonicClock(), _CHUNK_TOKENS)
    remote = _from_a_node(phase, model, options, prompts, planner)
    with Engine(model, options, device=phase.device, observer=planner) as engine:
        engine.warm_up()
        computed = _measured(engine, prompts[:_TURNS], planner, "recompute")
        host = _measured(engine, prompts[:_TURNS], planner, "recompute", in_host=True)
        hits = {tier.value: counts.hit_tokens for tier, counts in engine.statistics().tiers.items()}
    phase.rows.check("HOST had the prompts", hits["host"] > 0, str(hits))
    known = {"computed": computed, "in HOST": host, "from a node over loopback": remote}
    lacking = [name for name, each in known.items() if each.forecast_ms is None]
    phase.rows.check("each time to the first token was forecast", not lacking, f"not those {lacking}" if lacking else "")
    if phase.timings:
        wanted = {"in HOST": targets.TTFT_HOST}
        for name, each in known.items():
            label = f"TTFT, smollm2 8k {name}"
            phase.compare(label, each.ms, "ms", "computing", each.ms / computed.ms, wanted.get(name))
            if each.forecast_ms is not None:
                phase.compare(f"{label}, forecast", each.forecast_ms, "ms", "what was measured", each.forecast_ms / each.ms)
        copied = planner.report().copies
        phase.rows.check("copies from HOST are timed", Tier.HOST in copied, ", ".join(tier.value for tier in copied))


class _Measured(NamedTuple):
    """The median time to the first token, and its forecast before the last of them; None if a cost was unknown."""

    ms: float
    forecast_ms: float | None


def _measured(engine: Engine, prompts: list[list[int]], planner: CostPlanner, choice: str, *, in_host: bool = False) -> _Measured:
    times: list[float] = []
    forecast_ms = None
    for prompt in prompts:
        if in_host:
            engine.drop_cached()
        forecast_ms = planner.explain(_as_planned(engine, prompt, in_host=in_host)).forecasts.get(choice)
        times.append(_ttft_ms(engine, prompt))
    return _Measured(_median(times), forecast_ms)


def _as_planned(engine: Engine, prompt: list[int], *, in_host: bool) -> Prompt:
    """Returns the facts of a prompt that is wholly in HOST, or wholly not in this worker."""
    layout, usable = engine.layout, (len(prompt) - 1) // engine.layout.block_tokens
    here = usable if in_host else 0
    return Prompt(0, len(prompt), layout.block_tokens, layout.page_bytes, layout.layers, here, usable, here)


def _from_a_node(
    phase: Phase, model: LoadedModel, options: EngineOptions, prompts: list[list[int]], planner: CostPlanner
) -> _Measured:
    with StoreProcess("--capacity", "2GiB") as node, open_store(node.url, deadline_ms=_DEADLINE_MS) as store:
        measured = _Measured(0.0, None)
        for turn in range(2):
            with Engine(model, options, store=store, device=phase.device, observer=planner) as engine:
                engine.warm_up()
                measured = _measured(engine, prompts[:_TURNS], planner, "fetch")
                phase.rows.check(f"pages were written to the node, turn {turn}", engine.flush(_DEADLINE_MS))
                read = engine.statistics().remote.pages_read
        phase.rows.check("the node had the prompts", read > 0, f"{read} pages")
        _beside_a_swap_in(phase, model, options, store, prompts[0])
        return measured


def _beside_a_swap_in(phase: Phase, model: LoadedModel, options: EngineOptions, store: PageStore, prompt: list[int]) -> None:
    """Compares decode steps while the pages of a prompt come from a node with those before it."""
    with Engine(model, options, store=store, device=phase.device) as engine:
        engine.warm_up()
        decoding = SamplingParams(max_tokens=_STEPS_MAX)
        for number in range(_DECODES):
            engine.submit([3 + number, 4, 5], decoding)
        while engine.batching().tokens_generated < _DECODES:
            engine.step()
        alone = [_step_ms(engine) for _ in range(_STEPS)]
        swapped_in = engine.submit(prompt, SamplingParams(max_tokens=1))
        beside: list[float] = []
        while swapped_in.first_token_ms is None and len(beside) < _STEPS_MAX // 2:
            took_ms = _step_ms(engine)
            if engine.batching().loading:
                beside.append(took_ms)
        phase.rows.check("decodes go on beside a swap-in", swapped_in.first_token_ms is not None)
    if phase.timings and beside:
        before, during = _median(alone), _median(beside)
        phase.compare("decode step beside a swap-in", during, "ms", "alone", during / before, targets.DECODE_BESIDE_SWAP_IN)


def _step_ms(engine: Engine) -> float:
    begin = time.perf_counter()
    engine.step()
    return (time.perf_counter() - begin) * 1e3


def _ttft_ms(engine: Engine, prompt: list[int]) -> float:
    begin = time.perf_counter()
    engine.generate(prompt, SamplingParams(max_tokens=1))
    return (time.perf_counter() - begin) * 1e3


def _median(times: Iterable[float]) -> float:
    ordered = sorted(times)
    return ordered[len(ordered) // 2]
