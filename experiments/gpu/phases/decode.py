"""Steps of the model: decode with and without captured graphs against reading weights and KV once, prefill against products."""

from __future__ import annotations

import time
from collections.abc import Sequence

from attnstore.attention import create_attention
from attnstore.core.layout import DType
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.engine.device_runner import DeviceRunner, step_sizes
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.engine.sequence import Sequence as Prompted
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import SchedulerLimits
from attnstore_worker.random_models import LLAMA_3_8B, SMOLLM2_135M, LlamaShape, random_model
from experiments.gpu import targets
from experiments.gpu.phase import Phase
from experiments.gpu.results import Target

_BLOCK_TOKENS = 16
_CONTEXT_TOKENS = 1024
_BATCH = 64
_PREFILL_TOKENS = 8192
_STEPS = 30


def run(phase: Phase) -> None:
    """Measures each model."""
    small, large = SMOLLM2_135M, LLAMA_3_8B
    if phase.quick:
        small = small._replace(layers=2, hidden=192, intermediate=256, q_heads=3, kv_heads=1, vocabulary=512)
    _decode(phase, small, {1: None}, against_eager=True)
    if not phase.quick:
        _decode(phase, large, {1: targets.DECODE_LARGE_ALONE, _BATCH: targets.DECODE_LARGE_BATCH}, against_eager=False)


def _decode(phase: Phase, shape: LlamaShape, batches: dict[int, Target | None], *, against_eager: bool) -> None:
    model = random_model(shape, DType.BF16, phase.device)
    context_tokens = 64 if phase.quick else _CONTEXT_TOKENS
    if not phase.device.uses_triton:  # the model runs as on the processor, and nothing is captured
        phase.rows.check(f"{shape.name}: nothing to measure on {phase.device.name}", ok=True)
        return
    for sequences, target in batches.items():
        captured = _step_ms(phase, model, sequences, context_tokens, captured=True)
        eager = _step_ms(phase, model, sequences, context_tokens, captured=False)
        if captured is None or eager is None:
            continue
        name = f"decode, {shape.name}, {sequences} x {context_tokens}"
        read_bytes = _weight_bytes(model) + sequences * context_tokens * _token_bytes(model)
        phase.rate(f"{name}, captured", read_bytes / 1e9, "GB/s", captured, against="hbm_read", target=target)
        wanted = targets.DECODE_SMALL_GRAPHS if against_eager else None
        phase.compare(f"{name}, captured against eager", captured, "ms", "the eager step", eager / captured, wanted)
        if against_eager:
            limit = Target("<=", 1.0)
            phase.compare(f"{name}, milliseconds", captured, "ms", "0.6 ms", captured / targets.DECODE_SMALL_MS_MAX, limit)
        if sequences > 1:
            wall = _wall_ms(model, phase, sequences, context_tokens)
            phase.compare(f"{name}, host overhead", wall, "ms", "a step", (wall - captured) / wall, targets.HOST_OVERHEAD)
    if shape is LLAMA_3_8B:
        _prefill(phase, model)


def _prefill(phase: Phase, model: LoadedModel) -> None:
    runner, chunks = _prepared(phase, model, 1, 0, _PREFILL_TOKENS, captured=False)
    took_ms = phase.time_ms(lambda: runner.run(chunks), repeats=3)
    config = model.module.config
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * _PREFILL_TOKENS
    flops = _PREFILL_TOKENS * (2 * _parameters(model) + attention)
    phase.rate("prefill, llama-3-8b 8k", flops / 1e12, "TFLOP/s", took_ms, against="matmul", target=targets.PREFILL)


def _step_ms(phase: Phase, model: LoadedModel, sequences: int, context_tokens: int, *, captured: bool) -> float | None:
    runner, chunks = _prepared(phase, model, sequences, context_tokens - 1, context_tokens, captured=captured)
    return phase.time_ms(lambda: runner.run(chunks))


def _prepared(
    phase: Phase, model: LoadedModel, sequences: int, begin: int, end: int, *, captured: bool
) -> tuple[DeviceRunner, Sequence[Chunk]]:
    """Returns a runner with blocks of its own, and the chunks `[begin, end)` of so many sequences."""
    blocks = -(-end // _BLOCK_TOKENS)
    pool = phase.device.blocks(model.layout(_BLOCK_TOKENS), sequences * blocks)
    limits = SchedulerLimits(
        chunk_tokens=end - begin, step_tokens=(end - begin) + sequences, sequences_max=sequences, waiting_max=1
    )
    sizes = step_sizes(limits, blocks)
    runner = DeviceRunner(model, pool, create_attention("triton"), None, phase.device, sizes, before_step=_nothing)
    if captured:
        runner.warm_up()
    chunks = []
    for number in range(sequences):
        sequence = Prompted(number, [5 + number] * end, end, SamplingParams(), 0.0)
        sequence.table = BlockTable(_BLOCK_TOKENS, list(range(number * blocks, (number + 1) * blocks)))
        chunks.append(Chunk(sequence, begin, end))
    return runner, chunks


def _wall_ms(model: LoadedModel, phase: Phase, sequences: int, context_tokens: int) -> float:
    """Returns the host's time of a whole step of the engine, sampling and bookkeeping included."""
    page_bytes = model.layout(_BLOCK_TOKENS).page_bytes
    blocks = sequences * (-(-(context_tokens + 2 * _STEPS) // _BLOCK_TOKENS) + 1)
    options = EngineOptions(pool_bytes=blocks * page_bytes, chunk_tokens=_CONTEXT_TOKENS, sequences_max=sequences)
    with Engine(model, options, device=phase.device) as engine:
        engine.warm_up()
        for number in range(sequences):
            engine.submit([5 + number] * context_tokens, SamplingParams(max_tokens=2 * _STEPS))
        while engine.batching().tokens_generated < sequences * _STEPS // 2:
            engine.step()
        begin = time.perf_counter()
        for _ in range(_STEPS):
            engine.step()
        return (time.perf_counter() - begin) / _STEPS * 1e3


def _parameters(model: LoadedModel) -> int:
    return sum(parameter.numel() for name, parameter in model.module.named_parameters() if "embed_tokens" not in name)


def _weight_bytes(model: LoadedModel) -> int:
    return 2 * _parameters(model)


def _token_bytes(model: LoadedModel) -> int:
    layout = model.layout(_BLOCK_TOKENS)
    return layout.page_bytes // layout.block_tokens


def _nothing() -> None:
    """No copies are in flight."""
