"""The plan that the scheduler's half sends to the worker's half for a step. Plain values, because vLLM pickles them between
processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of vLLM's cache and its page's name, the same for every tensor-parallel rank: their namespaces differ."""

    block_id: int
    page_hash: bytes


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """The blocks that a waiting request gets from the store, in the order of its tokens and without a gap."""

    request_id: str
    blocks: tuple[BlockPlan, ...]


@dataclass(slots=True)
class StepPlan:
    """One step: the loads that begin with it, the blocks that are complete after it, and the token ranges `(begin, end)` that it
    computes, one for each request in it.
    """

    loads: list[RequestLoad] = field(default_factory=list)
    saves: list[BlockPlan] = field(default_factory=list)
    chunks: tuple[tuple[int, int], ...] = ()
