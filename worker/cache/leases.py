"""Leases that outlive one call: renewed and released on a thread of their own, so that the engine never waits for a store.

Owns: `LeaseKeeper`. Invariant: a kept lease is renewed until it is let go, and every lease that was kept is released once; what
a store answers, or that it does not, never reaches the caller as an error. A lease is a courtesy of the node: that bytes are
still the page's is known by their stamps alone.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Protocol

from attnstore import tasks
from attnstore.errors import AttnStoreError, LeaseExpired
from attnstore.types import Lease

_LOG = logging.getLogger(__name__)


class LeaseStore(Protocol):
    """What a keeper needs of a store."""

    def renew(self, lease: Lease, lease_ms: int, /) -> object:
        """Extends a lease to `lease_ms` from now. Raises `LeaseExpired`."""
        ...

    def release(self, lease: Lease, /) -> object:
        """Ends a lease."""
        ...


class KeptLease:
    """A lease that a keeper renews. `lost` once the store said that it has expired."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.lost = False


class LeaseKeeper:
    """Renews each lease every `period_ms` to its first length. `period_ms` is well below the shortest lease."""

    def __init__(self, store: LeaseStore, *, period_ms: float) -> None:
        self._store = store
        self._period_s = period_ms / 1e3
        self._kept: set[KeptLease] = set()
        self._released: list[Lease] = []
        self._closing = False
        self._changed = threading.Condition()
        tasks.supervised_thread("leases", self._run)

    def keep(self, lease: Lease) -> KeptLease:
        """Renews a lease from now on, until `let_go`."""
        kept = KeptLease(lease)
        with self._changed:
            self._kept.add(kept)
        return kept

    def let_go(self, kept: KeptLease) -> None:
        """Has a lease released soon, unless it was already."""
        with self._changed:
            if kept in self._kept:
                self._kept.remove(kept)
                self._released.append(kept.lease)
                self._changed.notify_all()

    def close(self) -> None:
        """Lets the thread end once everything is released, without waiting for it."""
        with self._changed:
            self._released += [kept.lease for kept in self._kept]
            self._kept.clear()
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                woken = self._changed.wait_for(lambda: self._released or self._closing, self._period_s)
                # One at a time, so that whatever a store raises costs the others nothing.
                released, self._released = self._released[:1], self._released[1:]
                kept = [] if woken else list(self._kept)
            for lease in released:
                with suppress(AttnStoreError):  # it runs out by itself
                    self._store.release(lease)
            for each in kept:
                self._renew(each)
            if self._closing and not self._released:
                return

    def _renew(self, kept: KeptLease) -> None:
        try:
            self._store.renew(kept.lease, kept.lease.lease_ms)
        except LeaseExpired:
            kept.lost = True
        except AttnStoreError as error:  # a node that does not answer recycles nothing either, or its stamps will tell
            _LOG.warning("a lease could not be renewed: %s", error)
