"""A slice of a trace through the engine and the real model: the waiting times of its users, and the tiers that served them.

Owns: `replay_with_model` and `ModelReplay`. Invariant: prompts share tokens exactly where the trace says that they share blocks.

A block of the trace becomes one block of the engine, so lengths, outputs included, are divided by 512 / block_tokens (32); its
tokens are drawn from its id. A unique token ends each prompt, so that there is something to compute if all blocks are found.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore_worker.cache import Tier
from attnstore_worker.engine import Engine, SamplingParams, Sequence
from experiments.replay.trace import BLOCK_TOKENS, Trace, TraceRequest

_FIRST_TOKEN_ID: Final = 3
_IDLE_S: Final = 0.002
_FLUSH_MS: Final = 10_000.0


@dataclass(frozen=True, slots=True)
class ModelReplay:
    """TTFT counts from arrival. `hit_rate` of each tier: prompt tokens found there / all prompt tokens, at admission."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    duration_s: float
    ttft_ms_mean: float
    ttft_ms_p50: float
    ttft_ms_p90: float
    ttft_ms_p99: float
    hit_rate: dict[str, float]
    bytes_up: dict[str, int]
    bytes_written: int
    preemptions: int


def replay_with_model(engine: Engine, trace: Trace, requests: int, slowdown: float, clock: Clock) -> ModelReplay:
    """Runs the first requests at the times of the trace, stretched by `slowdown`.

    Raises `InvalidArgument` if a prompt does not fit the model or the pool, or if the slowdown is not positive.
    """
    if not slowdown > 0:
        raise InvalidArgument(f"slowdown is {slowdown}; it must be positive")
    chosen = trace.requests[:requests]
    prompts = [prompt(request, engine.layout.block_tokens, engine.model.module.config.vocab_size) for request in chosen]
    outputs = [max(1, request.output_tokens * engine.layout.block_tokens // BLOCK_TOKENS) for request in chosen]
    engine.warm_up()
    arrivals = deque(zip(_arrivals_ms(chosen, slowdown), prompts, outputs, strict=True))
    sequences: list[tuple[float, Sequence]] = []
    began_ms = clock.now_ms()
    while arrivals or not engine.idle:
        while arrivals and began_ms + arrivals[0][0] <= clock.now_ms():
            arrival_ms, token_ids, output_tokens = arrivals.popleft()
            sequences.append((began_ms + arrival_ms, engine.submit(token_ids, SamplingParams(max_tokens=output_tokens))))
        if engine.idle:
            time.sleep(_IDLE_S)
        engine.step()
    duration_s = (clock.now_ms() - began_ms) / 1e3
    engine.flush(_FLUSH_MS)
    return _result(engine, sequences, duration_s)


def prompt(request: TraceRequest, block_tokens: int, vocabulary: int) -> list[int]:
    """Returns token ids: those of each block, and one that is unique to the prompt."""
    token_ids = [token for block in request.hashes for token in _block(block, block_tokens, vocabulary)]
    last = random.Random(f"{request.arrival_ms} {request.hashes[-1].hex()}").randrange(_FIRST_TOKEN_ID, vocabulary)
    return [*token_ids, last]


def describe(result: ModelReplay) -> str:
    """Returns the results as lines."""
    rates = ", ".join(f"{tier} {rate:.1%}" for tier, rate in result.hit_rate.items())
    moved = ", ".join(f"{bytes_up / 1e6:.1f} MB up from {tier}" for tier, bytes_up in result.bytes_up.items())
    return (
        f"{result.requests} requests with {result.prompt_tokens:,} prompt tokens in {result.duration_s:.0f} s, "
        f"{result.generated_tokens:,} tokens generated, {result.preemptions} preemptions\n"
        f"TTFT: mean {result.ttft_ms_mean:.0f} ms, p50 {result.ttft_ms_p50:.0f}, p90 {result.ttft_ms_p90:.0f}, "
        f"p99 {result.ttft_ms_p99:.0f}\n"
        f"prompt tokens found: {rates}\n"
        f"moved: {moved}, {result.bytes_written / 1e6:.1f} MB written to the store"
    )


def _block(block: BlockHash, block_tokens: int, vocabulary: int) -> list[int]:
    generator = random.Random(block)
    return [generator.randrange(_FIRST_TOKEN_ID, vocabulary) for _ in range(block_tokens)]


def _arrivals_ms(requests: Items[TraceRequest], slowdown: float) -> list[float]:
    return [(request.arrival_ms - requests[0].arrival_ms) * slowdown for request in requests]


def _result(engine: Engine, sequences: Items[tuple[float, Sequence]], duration_s: float) -> ModelReplay:
    ttfts_ms = sorted(_first_token_ms(sequence) - arrival_ms for arrival_ms, sequence in sequences)
    prompt_tokens = sum(sequence.prompt_tokens for _, sequence in sequences)
    hits = dict.fromkeys(Tier, 0)
    for _, sequence in sequences:
        assert sequence.admission is not None
        for tier, tokens in sequence.admission.hit_tokens_by_tier().items():
            hits[tier] += tokens
    statistics = engine.statistics()
    return ModelReplay(
        requests=len(sequences),
        prompt_tokens=prompt_tokens,
        generated_tokens=sum(len(sequence.generated) for _, sequence in sequences),
        duration_s=duration_s,
        ttft_ms_mean=fmean(ttfts_ms),
        ttft_ms_p50=_percentile(ttfts_ms, 0.5),
        ttft_ms_p90=_percentile(ttfts_ms, 0.9),
        ttft_ms_p99=_percentile(ttfts_ms, 0.99),
        hit_rate={tier.value: tokens / prompt_tokens for tier, tokens in hits.items()},
        bytes_up={tier.value: each.bytes_read for tier, each in statistics.tiers.items() if tier is not Tier.HBM},
        bytes_written=statistics.remote.bytes_written,
        preemptions=engine.batching().preemptions,
    )


def _first_token_ms(sequence: Sequence) -> float:
    assert sequence.first_token_ms is not None
    return sequence.first_token_ms


def _percentile(ordered: Items[float], share: float) -> float:
    """Returns the smallest value that at least this share of the values does not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]
