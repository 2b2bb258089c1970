"""The scheduler: which sequences run, which wait, and which tokens the next step computes.

Owns: the queue of waiting sequences and the set of running ones. It decides and touches no block: the engine acts, and tells it how
many blocks are available.
Invariant: a sequence is in at most one of them, and both are in order: the highest priority first, then the earliest arrival.

    (new)    enqueue -> WAITING      Overloaded if the queue is full
    WAITING  start   -> RUNNING
    RUNNING  preempt -> WAITING      in its old place, before all that arrived later; never refused
    WAITING, RUNNING  remove -> (gone)

A running sequence with pages in flight (LOADING) has its blocks and its place; in a step it computes only what it already may.

Continuous batching is Orca's (Yu et al., OSDI 2022), chunked prefill beside decodes is Sarathi-Serve's (Agrawal et al., OSDI 2024).
No sequence starves: one that does not fit keeps those behind it waiting, and every step has room for a chunk of prefill.
"""

from __future__ import annotations

from bisect import insort

from attnstore.errors import Overloaded
from attnstore_worker.engine.sequence import Chunk, Sequence, next_chunk
from attnstore_worker.options import SchedulerLimits


class Scheduler:
    """Decides for sequences whose blocks have `block_tokens` tokens."""

    def __init__(self, limits: SchedulerLimits, block_tokens: int) -> None:
        self._limits = limits
        self._block_tokens = block_tokens
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The running sequences, in order."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences, in order."""
        return tuple(self._waiting)

    @property
    def full(self) -> bool:
        """True if the queue accepts no new sequence."""
        return len(self._waiting) >= self._limits.waiting_max

    def enqueue(self, sequence: Sequence) -> None:
        """Queues a new sequence. Raises `Overloaded` if the queue is full."""
        if self.full:
            raise Overloaded(f"{len(self._waiting)} sequences are waiting, which is the limit")
        insort(self._waiting, sequence, key=_order)

    def admissible(self, available_blocks: int) -> Sequence | None:
        """Returns the first waiting sequence, if there are blocks for all its tokens and each running sequence could still grow by
        a block.

        If no sequence runs, the first one is always admissible: blocks that are not available then are held by transfers, which
        end.
        """
        if not self._waiting or len(self._running) >= self._limits.sequences_max:
            return None
        first = self._waiting[0]
        fits = self._blocks(first.room_tokens(self._limits.chunk_tokens)) + len(self._running) <= available_blocks
        return first if fits or not self._running else None

    def start(self, sequence: Sequence) -> None:
        """Records that a waiting sequence got its blocks."""
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_order)

    def victim(self, available_blocks: int) -> Sequence | None:
        """Returns the running sequence to preempt, the last in order, if there are too few blocks for all; never the first one."""
        missing = sum(self._missing_blocks(sequence) for sequence in self._running)
        return self._running[-1] if missing > available_blocks and len(self._running) > 1 else None

    def preempt(self, sequence: Sequence) -> None:
        """Records that a running sequence lost its blocks."""
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence that ended, in any state."""
        (self._running if sequence in self._running else self._waiting).remove(sequence)

    def chunks(self) -> list[Chunk]:
        """Returns what the next step computes: decodes first, then prefill up to the budget of the step.

        A chunk that does not fit waits as a whole, because its boundaries affect the rounding of results. A loading sequence may
        have nothing to compute.
        """
        chunks: list[Chunk] = []
        budget = self._limits.step_tokens
        candidates = [next_chunk(sequence, self._limits.chunk_tokens) for sequence in self._running]
        for chunk in sorted(candidates, key=lambda chunk: chunk.end - chunk.begin > 1):
            if 0 < chunk.tokens <= budget:
                budget -= chunk.tokens
                chunks.append(chunk)
        return chunks

    def _missing_blocks(self, sequence: Sequence) -> int:
        assert sequence.table is not None
        return max(0, self._blocks(sequence.room_tokens(self._limits.chunk_tokens)) - sequence.table.blocks)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)


def _order(sequence: Sequence) -> tuple[int, int]:
    return -sequence.priority, sequence.sequence_id
