"""The plan that the scheduler's half sends to the worker's half for a step. Plain values, because vLLM pickles them between
processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attnstore.limits import HASH_BYTES

NO_BLOCK: Final = -1
"""In the place of a block that a load must leave alone, because vLLM has it already."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of vLLM's group `group`, in order, and the blocks that they fill: as many for each page, or `NO_BLOCK`. The names are
    the same for every tensor-parallel rank: their namespaces differ.

    A long prompt has thousands, which are pickled as two sequences.
    """

    group: int
    names: Sequence[bytes]
    block_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.names)

    def blocks_of(self, pages: range) -> Sequence[int]:
        """Returns the blocks of some of the pages."""
        each = len(self.block_ids) // len(self.names)
        return self.block_ids[pages.start * each : pages.stop * each]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self.group, b"".join(self.names), array("i", self.block_ids).tobytes())


def _unpacked(group: int, names: bytes, block_ids: bytes) -> Pages:
    return Pages(group, [names[at : at + HASH_BYTES] for at in range(0, len(names), HASH_BYTES)], array("i", block_ids))


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """The pages that a waiting request gets from the store: of each group those that it needs, in the order of its tokens and
    without a gap. `source`: whose pages they are; 0 for the rank's own.
    """

    request_id: str
    parts: tuple[Pages, ...]
    source: int = 0


@dataclass(slots=True)
class StepPlan:
    """One step: the loads that begin with it, the pages that are complete after it, and the token ranges `(begin, end)` that it
    computes, one for each request in it.
    """

    loads: list[RequestLoad] = field(default_factory=list)
    saves: list[Pages] = field(default_factory=list)
    chunks: tuple[tuple[int, int], ...] = ()
