"""Which of this engine's blocks the store has, as events for routers that know what each cache holds.

Owns: the blocks that were announced, and what an announcement says of a block. Invariants: a block is announced when its page was
written or found, and once; it is withdrawn when a look-up does not find it, or when so many are announced that it is forgotten.
Memory is bounded. Called by one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_ANNOUNCED_MAX: Final = 1 << 18
"""Pages."""
_SAVING_MAX: Final = 1 << 14
"""Pages that are being written. A page that was dropped stays until it is forgotten."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A request as routers hash it: vLLM's hashes of its blocks and its tokens, which both grow, and its `cache_salt`."""

    block_hashes: Sequence[bytes]
    token_ids: Sequence[int]
    salt: str | None = None


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """The store has these blocks of vLLM, which follow each other and `parent` (None before a request's first block). `salt` is
    that of a chain's first block, as in vLLM's own events.
    """

    block_hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    salt: str | None = None


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """The store does not have these blocks of vLLM, or it is not known any more."""

    block_hashes: tuple[bytes, ...]


StoreEvent = BlocksStored | BlocksRemoved


class StoreEvents:
    """Collects events about blocks of `block_tokens`, of which a page has `page_blocks`. A page's name is the store's, a block's
    hash is vLLM's.
    """

    def __init__(
        self, block_tokens: int, page_blocks: int = 1, *, announced_max: int = _ANNOUNCED_MAX, saving_max: int = _SAVING_MAX
    ) -> None:
        self.block_tokens = block_tokens
        self._page_blocks = page_blocks
        self._announced_max = announced_max
        self._saving_max = saving_max
        self._announced: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()  # vLLM's hashes by page name
        self._saving: OrderedDict[bytes, BlocksStored] = OrderedDict()
        self._events: list[StoreEvent] = []

    def saving(self, chain: Chain, pages: Iterable[tuple[int, bytes]]) -> None:
        """These pages of a request, `(index, name)`, will be written: they may outlive the request."""
        for index, name in pages:
            if name not in self._announced:
                self._saving[name] = self._stored(chain, range(index, index + 1))
        while len(self._saving) > self._saving_max:
            self._saving.popitem(last=False)

    def written(self, names: Iterable[bytes]) -> None:
        """The store has taken these pages."""
        for name in names:
            event = self._saving.pop(name, None)
            if event is not None and name not in self._announced:
                self._announce((name,), event)
        self._forget()

    def found(self, chain: Chain, names: Sequence[bytes], found: int) -> None:
        """A look-up found the first `found` of a request's first pages, and not the rest."""
        begin = 0
        for index, name in enumerate(names[:found]):
            if name in self._announced:
                if begin < index:
                    self._announce(names[begin:index], self._stored(chain, range(begin, index)))
                begin = index + 1
        if begin < found:
            self._announce(names[begin:found], self._stored(chain, range(begin, found)))
        gone = tuple(block for name in names[found:] for block in self._announced.pop(name, ()))
        if gone:
            self._events.append(BlocksRemoved(gone))
        self._forget()

    def take(self) -> list[StoreEvent]:
        """Returns the events since the last call, in their order."""
        events, self._events = self._events, []
        return events

    def _stored(self, chain: Chain, pages: range) -> BlocksStored:
        blocks = range(pages.start * self._page_blocks, pages.stop * self._page_blocks)
        tokens = chain.token_ids[blocks.start * self.block_tokens : blocks.stop * self.block_tokens]
        parent = chain.block_hashes[blocks.start - 1] if blocks.start else None
        salt = None if blocks.start else chain.salt
        return BlocksStored(tuple(chain.block_hashes[blocks.start : blocks.stop]), parent, tuple(tokens), salt)

    def _announce(self, names: Sequence[bytes], event: BlocksStored) -> None:
        each = self._page_blocks
        self._announced |= {name: event.block_hashes[at * each : (at + 1) * each] for at, name in enumerate(names)}
        self._events.append(event)

    def _forget(self) -> None:
        excess = len(self._announced) - self._announced_max
        if excess > 0:
            gone = [self._announced.popitem(last=False)[1] for _ in range(excess)]
            self._events.append(BlocksRemoved(tuple(block for blocks in gone for block in blocks)))
