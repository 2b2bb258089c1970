"""Leases that outlive one call. A thread renews and releases them, so that the engine never waits for a store.

Owns: `LeaseKeeper`. Invariants: a kept lease is renewed every period until `let_go`, and is then released once; no failure of the
store reaches the caller as an error. A lease only delays eviction; stamps decide whether bytes still belong to a page.
"""

from __future__ import annotations

import logging
import threading

from attnstore import tasks
from attnstore.clock import Clock, MonotonicClock
from attnstore.errors import AttnStoreError, LeaseExpired
from attnstore.types import Lease
from attnstore_worker.cache.store.base import LeaseStore

_LOG = logging.getLogger(__name__)


class KeptLease:
    """A lease that a keeper renews. `lost`: the store has answered that it has expired."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.lost = False


class LeaseKeeper:
    """Renews each lease every `period_ms` to its first length. `period_ms` is well below the shortest lease."""

    def __init__(self, store: LeaseStore, *, period_ms: float, clock: Clock | None = None) -> None:
        self._store = store
        self._period_ms = period_ms
        self._clock = clock or MonotonicClock()
        self._due_ms = self._clock.now_ms() + period_ms
        self._kept: set[KeptLease] = set()
        self._released: list[Lease] = []
        self._closing = False
        self._changed = threading.Condition()
        tasks.supervised_thread("leases", self._run)

    def keep(self, lease: Lease) -> KeptLease:
        """Renews a lease until `let_go`."""
        kept = KeptLease(lease)
        with self._changed:
            self._kept.add(kept)
        return kept

    def let_go(self, kept: KeptLease) -> None:
        """Ends renewals; the thread releases the lease soon. No-op if it was called before."""
        with self._changed:
            if kept in self._kept:
                self._kept.remove(kept)
                self._released.append(kept.lease)
                self._changed.notify_all()

    def close(self) -> None:
        """Releases all leases; the thread ends once they are released. Does not wait."""
        with self._changed:
            self._released += [kept.lease for kept in self._kept]
            self._kept.clear()
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                due_in_ms = max(self._due_ms - self._clock.now_ms(), 0.0)
                self._changed.wait_for(lambda: self._released or self._closing, due_in_ms / 1e3)
                # One at a time, so that a store that is slow to release delays a renewal by at most one call.
                released, self._released = self._released[:1], self._released[1:]
            # The clock decides, because a release may have woken this thread.
            if (now_ms := self._clock.now_ms()) >= self._due_ms:
                self._due_ms = now_ms + self._period_ms
                for kept in self._now_kept():
                    self._renew(kept)
            for lease in released:
                self._release(lease)
            if self._closing and not self._released:
                return

    def _now_kept(self) -> list[KeptLease]:
        with self._changed:
            return list(self._kept)

    def _renew(self, kept: KeptLease) -> None:
        try:
            self._store.renew(kept.lease, kept.lease.lease_ms)
        except LeaseExpired:
            kept.lost = True
        except Exception as error:  # the stamps show whether the node recycled a page
            _LOG.warning("a lease could not be renewed: %s: %s", type(error).__name__, error)

    def _release(self, lease: Lease) -> None:
        try:
            self._store.release(lease)
        except AttnStoreError:
            pass  # it expires
        except Exception as error:
            _LOG.warning("a lease could not be released: %s: %s", type(error).__name__, error)
