"""What the scheduler's half tells the worker's half, and what it hears back. Plain values: vLLM pickles them between processes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of vLLM's cache and its page's name, the same for every tensor-parallel rank: their namespaces differ."""

    block_id: int
    page_hash: bytes


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The blocks that a waiting request is to get from the store, a run in the order of its tokens."""

    request_id: str
    blocks: tuple[BlockPlan, ...]


@dataclass(slots=True)
class StepPlan:
    """One step: the loads that begin with it, the blocks that are complete after it, and the tokens that it computes."""

    loads: list[LoadPlan] = field(default_factory=list)
    saves: list[BlockPlan] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a worker measured since it last told: `(bytes, ms)` of loads and `(tokens, ms)` of steps."""

    loads: tuple[tuple[int, float], ...] = ()
    steps: tuple[tuple[int, float], ...] = ()

    def merged(self, other: Costs) -> Costs:
        """Those of several workers together."""
        return Costs(self.loads + other.loads, self.steps + other.steps)
