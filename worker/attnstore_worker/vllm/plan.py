"""The plan that the scheduler's half sends to the worker's half for a step. Plain values, because vLLM pickles them between
processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from attnstore.limits import HASH_BYTES


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of vLLM's cache and its page's name, the same for every tensor-parallel rank: their namespaces differ."""

    block_id: int
    page_hash: bytes


class Blocks(Sequence[BlockPlan]):
    """Block `block_ids[i]` and page `page_hashes[i]`. A long prompt has thousands, which are kept and pickled as two sequences."""

    __slots__ = ("_block_ids", "_page_hashes")

    def __init__(self, block_ids: Sequence[int], page_hashes: Sequence[bytes]) -> None:
        self._block_ids = block_ids
        self._page_hashes = page_hashes

    def __len__(self) -> int:
        return len(self._block_ids)

    @overload
    def __getitem__(self, index: int) -> BlockPlan: ...
    @overload
    def __getitem__(self, index: slice) -> Blocks: ...
    def __getitem__(self, index: int | slice) -> BlockPlan | Blocks:
        if isinstance(index, slice):
            return Blocks(self._block_ids[index], self._page_hashes[index])
        return BlockPlan(self._block_ids[index], self._page_hashes[index])

    def __iter__(self) -> Iterator[BlockPlan]:
        return map(BlockPlan, self._block_ids, self._page_hashes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (array("I", self._block_ids).tobytes(), b"".join(self._page_hashes))


def _unpacked(block_ids: bytes, page_hashes: bytes) -> Blocks:
    hashes = [page_hashes[at : at + HASH_BYTES] for at in range(0, len(page_hashes), HASH_BYTES)]
    return Blocks(array("I", block_ids), hashes)


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """The blocks that a waiting request gets from the store, in the order of its tokens and without a gap."""

    request_id: str
    blocks: Sequence[BlockPlan]


@dataclass(slots=True)
class StepPlan:
    """One step: the loads that begin with it, the blocks that are complete after it, and the token ranges `(begin, end)` that it
    computes, one for each request in it.
    """

    loads: list[RequestLoad] = field(default_factory=list)
    saves: list[BlockPlan] = field(default_factory=list)
    chunks: tuple[tuple[int, int], ...] = ()
