"""The block table of one sequence: its blocks in order, and the slot of each token.

Owns: the mapping from a token's position to `(block_id, offset)`. Invariant: block `j` holds positions
`[j * block_tokens, (j + 1) * block_tokens)`; the first `sealed` blocks are complete and never written again; the first
`remote_blocks` of them are attended to in the store, and `block_ids` has those after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from attnstore.core.hashing import BlockHash


class LentBlocks(Protocol):
    """Blocks in a store node's memory that one sequence may use. `block_ids` name them until `release`."""

    @property
    def block_ids(self) -> Sequence[int]:
        """One per page, in order."""
        ...

    def intact(self) -> bool:
        """Returns whether every block still holds its page. Called after use: results from bytes that are not intact are void."""
        ...

    def release(self) -> None:
        """Ends the use of the blocks."""
        ...


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence. `hashes[j]` names block `j`; all complete blocks of the prompt are named at admission.

    The list of hashes belongs to the sequence and outlives the table; `extra_keys` are part of all of them. `lent` holds the blocks
    in a node's memory.
    """

    block_tokens: int
    block_ids: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    extra_keys: Sequence[bytes] = ()
    sealed: int = 0
    lent: LentBlocks | None = None
    remote_blocks: int = 0

    @property
    def own_block_ids(self) -> list[int]:
        """The blocks of the worker's own pool, in order."""
        lent = set(self.lent.block_ids) if self.lent is not None else set()
        return [block_id for block_id in self.block_ids if block_id not in lent]

    @property
    def blocks(self) -> int:
        """The number of blocks that have a place, here or in the store."""
        return self.remote_blocks + len(self.block_ids)

    @property
    def remote_tokens(self) -> int:
        """The number of tokens before the first one stored here."""
        return self.remote_blocks * self.block_tokens

    def is_intact(self) -> bool:
        """Whether the blocks that lie in a node's memory still hold their pages. To be asked after a step that used them."""
        return self.lent is None or self.lent.intact()

    @property
    def capacity_tokens(self) -> int:
        """The number of tokens for which the held blocks have room."""
        return self.blocks * self.block_tokens

    def slot_mapping(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """Returns `(block_ids, offsets)` of positions `[begin, end)`, one entry per token."""
        assert self.remote_tokens <= begin <= end <= self.capacity_tokens
        positions = range(begin - self.remote_tokens, end - self.remote_tokens)
        return [self.block_ids[p // self.block_tokens] for p in positions], [p % self.block_tokens for p in positions]
