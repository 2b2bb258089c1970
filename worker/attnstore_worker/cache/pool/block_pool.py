"""The block pool: the holders of each block, and the blocks that can be found by their hash.

Owns: reference counts and the prefix cache (`BlockHash` -> `block_id`). It knows block ids, not bytes; an eviction policy, which
knows hashes, has the order of eviction.
Invariant: every block is in exactly one state, so `free + held + evictable == capacity`; `check()` verifies it.

    FREE       no content worth keeping              allocate -> HELD
    HELD       one or more holders                   release of the last -> EVICTABLE if sealed, else FREE
    EVICTABLE  sealed, no holder, findable           hold -> HELD;  taken by allocate when the policy names it -> HELD

A transfer holds the blocks that it reads or writes like any other holder, so none of them is recycled meanwhile. Not thread-safe:
one thread owns a pool. The design is vLLM's block pool without its copy-on-write, which sealed (immutable) blocks never need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from attnstore.core.eviction import EvictionPolicy, LeastRecentlyUsed
from attnstore.core.hashing import BlockHash
from attnstore.errors import Overloaded


@dataclass(frozen=True, slots=True)
class BlockPoolStatistics:
    """A snapshot, in blocks. `evicted` counts since the start."""

    capacity: int
    free: int
    held: int
    evictable: int
    evicted: int


class BlockPool:
    """The states of `capacity` blocks with ids `0 .. capacity - 1`. `policy` is the pool's own; default: least recently used.

    `on_evict` is called with each evicted block while its bytes are still valid; it must not raise or call this pool.
    """

    def __init__(
        self,
        capacity: int,
        policy: EvictionPolicy[BlockHash] | None = None,
        *,
        on_evict: Callable[[BlockHash, int], None] | None = None,
    ) -> None:
        assert capacity > 0
        self._on_evict = on_evict
        self._capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._policy = LeastRecentlyUsed[BlockHash]() if policy is None else policy
        self._ranked: set[BlockHash] = set()  # admitted to the policy: evictable, or held and withdrawn from it
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._evicted = 0

    @property
    def available(self) -> int:
        """How many blocks `allocate` could return now."""
        return len(self._free) + len(self._policy)

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Returns whether a sealed block with that hash is here."""
        return block_hash in self._block_of

    def holders(self, block_id: int) -> int:
        """Returns how many hold the block; 0 if it is free or evictable."""
        return self._holders.get(block_id, 0)

    def allocate(self) -> int:
        """Returns a block with one holder, a free one or by eviction. Raises `Overloaded` if all are held."""
        if self._free:
            block_id = self._free.pop()
        elif (victim := self._policy.victim()) is not None:
            block_id = self._evict(victim)
        else:
            raise Overloaded(f"all {self._capacity} blocks of the pool are held")
        self._holders[block_id] = 1
        return block_id

    def hold(self, block_id: int) -> None:
        """Adds a holder to a block that is held or evictable."""
        if block_id in self._holders:
            self._holders[block_id] += 1
        else:
            self._policy.withdrawn([self._hash_of[block_id]])
            self._holders[block_id] = 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Removes one holder from each block. Those that become evictable count as used in the given order."""
        evictable: list[BlockHash] = []
        for block_id in block_ids:
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                continue
            del self._holders[block_id]
            if block_id in self._hash_of:
                evictable.append(self._hash_of[block_id])
            else:
                self._free.append(block_id)
        for ranked, hashes in groupby(evictable, self._ranked.__contains__):
            if ranked:
                self._policy.returned(list(hashes))
            else:
                self._admit(hashes)

    def hold_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Returns the blocks of the longest cached prefix of `hashes`, each with one more holder."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            self.hold(block_id)
            block_ids.append(block_id)
        return block_ids

    def seal(self, block_id: int, block_hash: BlockHash) -> bool:
        """Makes a held, complete block findable. Returns False if another block already has that hash: this one stays private."""
        assert block_id in self._holders
        assert block_id not in self._hash_of
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        return True

    def announce(self, hashes: Sequence[BlockHash]) -> None:
        """Announces that a sequence behind all others will use these blocks; a look-ahead policy evicts them last."""
        self._policy.announced(hashes)

    def settle(self, hashes: Sequence[BlockHash]) -> None:
        """Ends an announcement of exactly these blocks: the sequence has its blocks or was cancelled."""
        self._policy.settled(hashes)

    def drop_evictable(self) -> None:
        """Evicts every block without a holder."""
        while (victim := self._policy.victim()) is not None:
            self._free.append(self._evict(victim))

    def statistics(self) -> BlockPoolStatistics:
        """A snapshot."""
        return BlockPoolStatistics(self._capacity, len(self._free), len(self._holders), len(self._policy), self._evicted)

    def check(self) -> None:
        """Asserts that every block is in exactly one state, and that the prefix cache and the policy agree with it."""
        evictable = [block_id for block_id in self._hash_of if block_id not in self._holders]
        states = [*self._free, *self._holders, *evictable]
        assert sorted(states) == list(range(self._capacity)), "free + held + evictable != capacity"
        assert all(count > 0 for count in self._holders.values())
        assert {block_id: block_hash for block_hash, block_id in self._block_of.items()} == self._hash_of
        assert not any(block_id in self._hash_of for block_id in self._free)
        assert len(self._policy) == len(evictable)
        assert all(self._hash_of[block_id] in self._policy for block_id in evictable)
        assert self._ranked <= self._block_of.keys()

    def _evict(self, victim: BlockHash) -> int:
        self._policy.removed(victim)
        self._ranked.remove(victim)
        block_id = self._block_of.pop(victim)
        del self._hash_of[block_id]
        self._evicted += 1
        if self._on_evict is not None:
            self._on_evict(victim, block_id)
        return block_id

    def _admit(self, hashes: Iterable[BlockHash]) -> None:
        for block_hash in hashes:
            self._ranked.add(block_hash)
            self._policy.admitted(block_hash)
