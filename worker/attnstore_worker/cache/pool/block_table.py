"""Where one sequence's tokens lie: its blocks in order, and the slot of each token.

Owns: the mapping from a token's position to `(block_id, offset)`. Invariant: block `j` holds positions
`[j * block_tokens, (j + 1) * block_tokens)`; the first `sealed` blocks are complete and will never be written again; the first
`remote_blocks` of them are attended to where they lie in the store, and `block_ids` has those after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from attnstore.core.hashing import BlockHash


class LentBlocks(Protocol):
    """Blocks that lie in a store node's memory and are one sequence's to use. `block_ids` name them until `release`."""

    @property
    def block_ids(self) -> Sequence[int]:
        """One for each page, in order."""
        ...

    def intact(self) -> bool:
        """Whether every block still holds its page. Asked after use: what was computed from bytes that are not intact is void."""
        ...

    def release(self) -> None:
        """Ends the hold."""
        ...


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence. `hashes[j]` names block `j`; all of the prompt's complete blocks are named at admission.

    The list of hashes is the sequence's own and outlives the table; `extra_keys` are in all of them. `lent` holds the blocks that
    lie in a node's memory.
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
        """Blocks that have a place, here or in the store."""
        return self.remote_blocks + len(self.block_ids)

    @property
    def remote_tokens(self) -> int:
        """Tokens before the first one that lies here."""
        return self.remote_blocks * self.block_tokens

    def is_intact(self) -> bool:
        """Whether the blocks that lie in a node's memory still hold their pages. To be asked after a step that used them."""
        return self.lent is None or self.lent.intact()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the blocks held now have room for."""
        return self.blocks * self.block_tokens

    def slot_mapping(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """`(block_ids, offsets)` of positions `[begin, end)`, one entry per token."""
        assert self.remote_tokens <= begin <= end <= self.capacity_tokens
        positions = range(begin - self.remote_tokens, end - self.remote_tokens)
        return [self.block_ids[p // self.block_tokens] for p in positions], [p % self.block_tokens for p in positions]
