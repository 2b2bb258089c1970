"""The connector's counters, for vLLM's `/metrics`.

Owns: their names and meaning, and the counts since the last report. vLLM adds up the counts of its processes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from attnstore_worker.cache.store.transfer import Transfer, TransferKind, TransferObserver

COUNTERS: Final = {
    "hit_tokens": "Prompt tokens that vLLM was told to load from the store.",
    "lookups": "Calls that asked the store which pages it has.",
    "lookup_seconds": "Duration of these calls, which overlap.",
    "lookup_failures": "Those that failed, or were not made because the store had just failed.",
    "loaded_bytes": "Bytes of pages read from the store.",
    "load_seconds": "Duration of the reads, which overlap.",
    "load_failures": "Reads that failed or did not end in time.",
    "saved_bytes": "Bytes of pages written to the store.",
    "save_seconds": "Duration of the writes.",
    "save_failures": "Writes that failed.",
}
_KINDS: Final = {
    TransferKind.MATCH: ("lookups", "lookup_seconds", "lookup_failures"),
    TransferKind.READ: ("loaded_bytes", "load_seconds", "load_failures"),
    TransferKind.WRITE: ("saved_bytes", "save_seconds", "save_failures"),
}


class Counts:
    """A `TransferObserver` that counts, and passes each transfer on to `then`. Thread-safe."""

    def __init__(self, then: TransferObserver | None = None) -> None:
        self._then = then
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)

    def transferred(self, transfer: Transfer) -> None:
        """See `TransferObserver`."""
        names = _KINDS.get(transfer.kind)
        if names is not None:
            amount, seconds, failures = names
            with self._lock:
                self._counts[amount] += 1 if transfer.kind is TransferKind.MATCH else transfer.bytes
                self._counts[seconds] += (transfer.ended_ms - transfer.started_ms) / 1e3
                self._counts[failures] += transfer.failed
        if self._then is not None:
            self._then.transferred(transfer)

    def hit(self, tokens: int) -> None:
        """A load of that many tokens was decided."""
        with self._lock:
            self._counts["hit_tokens"] += tokens

    def take(self) -> dict[str, float]:
        """Returns the counts since the last call, without those that are 0."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        return {name: value for name, value in counts.items() if value}
