"""Time to the first token by tier, and what a swap-in costs the decodes beside it."""

from __future__ import annotations

import time
from collections.abc import Iterable

from attnstore.core.layout import DType
from attnstore.testing import StoreProcess
from attnstore_worker.cache import PageStore, open_store
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.random_models import SMOLLM2_135M, random_model
from experiments.gpu import targets
from experiments.gpu.phase import Phase

_BLOCK_TOKENS = 16
_DEADLINE_MS = 30_000
_TURNS = 3
_DECODES = 4
_STEPS = 30
_STEPS_MAX = 4_000


def run(phase: Phase) -> None:
    """Measures a prompt of 8k tokens that is computed, in HOST, or at a node of this machine."""
    shape, tokens = SMOLLM2_135M, 8_000
    if phase.quick:
        shape, tokens = shape._replace(layers=2, hidden=192, intermediate=256, q_heads=3, kv_heads=1, vocabulary=512), 200
    model = random_model(shape, DType.BF16, phase.device)
    pool_bytes = 2 * (tokens // _BLOCK_TOKENS + 2) * model.layout(_BLOCK_TOKENS).page_bytes
    options = EngineOptions(pool_bytes=pool_bytes, host_pool_bytes=2 * pool_bytes, chunk_tokens=512)
    prompts = [[(at * 7 + number) % 500 + 5 for at in range(tokens)] for number in range(1 + _TURNS)]
    with Engine(model, options, device=phase.device) as engine:
        engine.warm_up()
        computed = _median(_ttft_ms(engine, prompt) for prompt in prompts[:_TURNS])
        again = []
        for prompt in prompts[:_TURNS]:
            engine.drop_cached()  # to HOST
            again.append(_ttft_ms(engine, prompt))
        host = _median(again)
        hits = {tier.value: counts.hit_tokens for tier, counts in engine.statistics().tiers.items()}
    phase.rows.check("HOST had the prompts", hits["host"] > 0, str(hits))
    remote = _from_a_node(phase, model, options, prompts)
    if phase.timings:
        phase.compare("TTFT, smollm2 8k computed", computed, "ms", "itself", 1.0)
        phase.compare("TTFT, smollm2 8k in HOST", host, "ms", "computing", host / computed, targets.TTFT_HOST)
        phase.compare("TTFT, smollm2 8k from a node over loopback", remote, "ms", "computing", remote / computed)


def _from_a_node(phase: Phase, model: LoadedModel, options: EngineOptions, prompts: list[list[int]]) -> float:
    with StoreProcess("--capacity", "2GiB") as node, open_store(node.url, deadline_ms=_DEADLINE_MS) as store:
        times: list[float] = []
        for turn in range(2):
            with Engine(model, options, store=store, device=phase.device) as engine:
                engine.warm_up()
                times = [_ttft_ms(engine, prompt) for prompt in prompts[:_TURNS]]
                phase.rows.check(f"pages were written to the node, turn {turn}", engine.flush(_DEADLINE_MS))
                read = engine.statistics().remote.pages_read
        phase.rows.check("the node had the prompts", read > 0, f"{read} pages")
        _beside_a_swap_in(phase, model, options, store, prompts[0])
        return _median(times)


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
