"""Look-ups beside the engine's loop: how many leading pages of each prompt the store has.

Owns: the threads that ask, and the look-ups that wait for one. Invariants: neither starting a look-up nor reading its answer waits
for the store, a lock or a thread; names are hashed by the threads, because a long prompt has thousands of blocks. Look-ups that
wait together are one call, so that many prompts which arrive at once cost one round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Final

from attnstore import tasks
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.limits import CHANNEL_READ_HASHES_MAX, HASHES_MAX
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.identity import page_hashes

LOOKUP_THREADS: Final = 4
"""Calls under way at once: a prompt that arrives while one is under way does not wait for its end."""
_NAMES_MAX: Final = HASHES_MAX - CHANNEL_READ_HASHES_MAX
"""Of one prompt. Look-ups are joined while they have fewer than CHANNEL_READ_HASHES_MAX names, and all must fit one call."""


class Lookup:
    """One prompt's look-up: how many leading pages were `found`, and whether the store `failed` to answer for all of them. These
    and the `names` are set before `done`.

    `block_hashes` are vLLM's. A look-up that was `dropped` before its turn is not made.
    """

    __slots__ = ("began_ms", "block_hashes", "done", "dropped", "failed", "found", "names")

    def __init__(self, block_hashes: Sequence[bytes], began_ms: float) -> None:
        self.block_hashes = block_hashes
        self.began_ms = began_ms
        self.names: list[BlockHash] = []
        self.found = 0
        self.failed = True
        self.done = False
        self.dropped = False


class Lookups:
    """Asks `tier` about prompts whose first block follows `root`. `start` and `close` are called by one thread."""

    def __init__(self, tier: RemoteTier, root: Namespace) -> None:
        self._tier = tier
        self._root = root
        self._waiting: SimpleQueue[Lookup | None] = SimpleQueue()  # None ends a thread
        for _ in range(LOOKUP_THREADS):
            tasks.supervised_thread("lookup", self._run)

    def start(self, block_hashes: Sequence[bytes]) -> Lookup:
        """Starts a look-up of the pages of these blocks; of none, it finds out whether the store answers."""
        lookup = Lookup(block_hashes, self._tier.now_ms())
        self._waiting.put(lookup)
        return lookup

    def close(self) -> None:
        """Ends the threads, without waiting for their calls."""
        for _ in range(LOOKUP_THREADS):
            self._waiting.put(None)

    def _run(self) -> None:
        while (asked := self._take()) is not None:
            self._ask([lookup for lookup in asked if not lookup.dropped])

    def _take(self) -> list[Lookup] | None:
        """Waits for look-ups. Returns those that one call asks for; None at the end."""
        taken: list[Lookup] = []
        names = 0
        lookup = self._waiting.get()
        while lookup is not None:
            taken.append(lookup)
            names += len(lookup.block_hashes)
            if names >= CHANNEL_READ_HASHES_MAX:
                return taken
            try:
                lookup = self._waiting.get_nowait()
            except Empty:
                return taken
        if taken:
            self._waiting.put(None)  # the end is taken next
        return taken or None

    def _ask(self, lookups: Sequence[Lookup]) -> None:
        if not lookups:
            return
        try:
            for lookup in lookups:
                lookup.names = page_hashes(self._root, lookup.block_hashes[:_NAMES_MAX])
            result = self._tier.look_up([lookup.names for lookup in lookups])
            for lookup, pages in zip(lookups, result.hits, strict=True):
                lookup.found, lookup.failed = pages, result.error is not None
        finally:
            for lookup in lookups:
                lookup.done = True
