"""The arithmetic of moving or recomputing KV. Pure; docs/plan.md lists every formula with its source.

Owns: `Question`, `Plan` and `answer`. Invariant: an estimate contains no guess that would make the network look worse or better
(congestion, queues, kernels that miss the roofline): utilisation is one stated number, `mfu`, and everything else comes from the
data sheets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnstore.errors import InvalidArgument
from attnstore.limits import BLOCK_TOKENS_MAX, CONTEXT_TOKENS_MAX, GPUS_MAX, MEMORY_GB_PER_S_MAX
from attnstore.links import LinkProfile
from attnstore.whatif.hardware import Gpu
from attnstore.whatif.model import Model

_ITEM_BYTES = 2
"""KV and weights in 16 bits."""
_PARTIAL_ITEM_BYTES = 4
"""A partial result is sent in fp32."""
_ROUND_TRIPS = 2
"""A fetch needs two round trips: Match, then Read."""


@dataclass(frozen=True, slots=True)
class Question:
    """The input. `hit` is the share of `context_tokens` whose KV the store has; only whole blocks count.

    `mfu` is the share of the GPUs' peak that prefill reaches; at 1 computing is as fast as possible, which is the network's worst
    case. `node_gb_per_s` is the memory bandwidth with which a node answers a query. Raises `InvalidArgument` for values out of
    range.
    """

    model: Model
    gpu: Gpu
    link: LinkProfile
    context_tokens: int
    hit: float
    gpus: int = 1
    mfu: float = 1.0
    node_gb_per_s: float = 300.0
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.context_tokens <= CONTEXT_TOKENS_MAX:
            raise InvalidArgument(f"context is {self.context_tokens} tokens; it must be between 1 and {CONTEXT_TOKENS_MAX:,}")
        if not 0 <= self.hit <= 1:
            raise InvalidArgument(f"hit is {self.hit}; it is a share between 0 and 1")
        if not 0 < self.mfu <= 1:
            raise InvalidArgument(f"mfu is {self.mfu}; it is a share above 0 and at most 1")
        if not 1 <= self.gpus <= GPUS_MAX:
            raise InvalidArgument(f"gpus is {self.gpus}; it must be between 1 and {GPUS_MAX}")
        if not 0 < self.node_gb_per_s <= MEMORY_GB_PER_S_MAX:
            raise InvalidArgument(f"node_gb_per_s is {self.node_gb_per_s}; it must be above 0 and at most {MEMORY_GB_PER_S_MAX:g}")
        if not 1 <= self.block_tokens <= BLOCK_TOKENS_MAX:
            raise InvalidArgument(f"block_tokens is {self.block_tokens}; it must be between 1 and {BLOCK_TOKENS_MAX}")


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Time to the first token, in milliseconds, for each way to obtain the prefix.

    `both_ms`: the front is computed while the back is fetched, and both stop where they meet, after `both_computed_tokens` (the
    whole context if fetching does not pay).
    """

    recompute_ms: float
    fetch_ms: float
    both_ms: float
    both_computed_tokens: int

    @property
    def best(self) -> str:
        """Returns the fastest way; of equal ones the simplest."""
        ways = {"recompute": self.recompute_ms, "fetch": self.fetch_ms, "both": self.both_ms}
        return min(ways, key=lambda way: ways[way])


@dataclass(frozen=True, slots=True)
class Decode:
    """One decoded token at the full context, batch 1, in milliseconds: weights and KV, for each place of the KV.

    `attend_bytes` are the bytes sent for one token, in both directions, if the node answers the queries.
    """

    weights_ms: float
    hbm_ms: float
    fetched_ms: float
    attend_ms: float
    attend_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The result. Bytes are of all GPUs together; `break_even_gb_per_s` is inf if the round trips alone take longer
    than computing.
    """

    kv_token_bytes: int
    page_bytes: int
    hit_tokens: int
    hit_bytes: int
    context_bytes: int
    prefix_recompute_ms: float
    prefix_fetch_ms: float
    break_even_gb_per_s: float
    hbm_to_link: float
    first_token: FirstToken
    decode: Decode


def answer(question: Question) -> Plan:
    """Computes the whole plan."""
    model, link, block = question.model, question.link, question.block_tokens
    page_bytes = model.layout(block).page_bytes
    token_bytes = page_bytes // block
    # The last token is always computed, because its logits are needed.
    hit_blocks = min(int(question.context_tokens * question.hit) // block, (question.context_tokens - 1) // block)
    hit_tokens = hit_blocks * block
    recompute_s = _prefill_s(question, 0, hit_tokens)
    round_trips_s = _ROUND_TRIPS * link.rtt_ms / 1000
    hit_bytes = hit_tokens * token_bytes
    bytes_s = recompute_s - round_trips_s
    return Plan(
        kv_token_bytes=token_bytes,
        page_bytes=page_bytes,
        hit_tokens=hit_tokens,
        hit_bytes=hit_bytes,
        context_bytes=question.context_tokens * token_bytes,
        prefix_recompute_ms=recompute_s * 1000,
        prefix_fetch_ms=_fetch_s(question, hit_bytes) * 1000,
        break_even_gb_per_s=hit_bytes / bytes_s / 1e9 if bytes_s > 0 else math.inf,
        hbm_to_link=question.gpu.hbm_gb_per_s / link.down_gb_per_s,
        first_token=_first_token(question, hit_blocks, page_bytes),
        decode=_decode(question, question.context_tokens * token_bytes),
    )


def _prefill_s(question: Question, begin: int, end: int) -> float:
    """Roofline: operations at `mfu` of the peak, or reading the weights once, whichever takes longer."""
    if end <= begin:
        return 0.0
    peak_flop_per_s = question.gpus * question.gpu.bf16_tflop_per_s * 1e12 * question.mfu
    return max(question.model.prefill_flop(begin, end) / peak_flop_per_s, _weights_s(question))


def _weights_s(question: Question) -> float:
    return question.model.active_weights * _ITEM_BYTES / (question.gpus * question.gpu.hbm_gb_per_s * 1e9)


def _fetch_s(question: Question, size_bytes: int) -> float:
    if size_bytes == 0:
        return 0.0
    return _ROUND_TRIPS * question.link.rtt_ms / 1000 + size_bytes * 8 / question.link.down_bits_per_s


def _first_token(question: Question, hit_blocks: int, page_bytes: int) -> FirstToken:
    block, hit_tokens = question.block_tokens, hit_blocks * question.block_tokens
    rest_s = _prefill_s(question, hit_tokens, question.context_tokens)

    def computed_s(blocks: int) -> float:
        return _prefill_s(question, 0, blocks * block)

    def fetched_s(blocks: int) -> float:
        return _fetch_s(question, (hit_blocks - blocks) * page_bytes)

    # With every block from the front, computing takes longer and fetching shorter: they cross once.
    low, high = 0, hit_blocks
    while low < high:
        middle = (low + high) // 2
        if computed_s(middle) < fetched_s(middle):
            low = middle + 1
        else:
            high = middle
    recompute_s = _prefill_s(question, 0, question.context_tokens)
    meetings = [(max(computed_s(blocks), fetched_s(blocks)) + rest_s, blocks * block) for blocks in {max(0, low - 1), low}]
    # Computing everything is one pass, not a front and a rest.
    both_s, computed_tokens = min((recompute_s, question.context_tokens), *meetings)
    return FirstToken(
        recompute_ms=recompute_s * 1000,
        fetch_ms=(fetched_s(0) + rest_s) * 1000,
        both_ms=both_s * 1000,
        both_computed_tokens=computed_tokens,
    )


def _decode(question: Question, context_bytes: int) -> Decode:
    model, link = question.model, question.link
    weights_s = _weights_s(question)
    query_bytes = model.heads * model.head_dim * _ITEM_BYTES
    partial_bytes = model.heads * (model.head_dim + 1) * _PARTIAL_ITEM_BYTES
    exchange_s = link.rtt_ms / 1000 + query_bytes * 8 / link.up_bits_per_s + partial_bytes * 8 / link.down_bits_per_s
    hbm_s = context_bytes / (question.gpus * question.gpu.hbm_gb_per_s * 1e9)
    fetched_s = link.rtt_ms / 1000 + context_bytes * 8 / link.down_bits_per_s
    attend_s = model.layers * exchange_s + context_bytes / (question.node_gb_per_s * 1e9)
    return Decode(
        weights_ms=weights_s * 1000,
        hbm_ms=(weights_s + hbm_s) * 1000,
        fetched_ms=(weights_s + hbm_s + fetched_s) * 1000,
        attend_ms=(weights_s + attend_s) * 1000,
        attend_bytes=model.layers * (query_bytes + partial_bytes),
    )
