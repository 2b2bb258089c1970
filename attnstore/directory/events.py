"""Page events published through the directory: packed by the node, unpacked by the watcher.

Owns: `EventFeed`, a node's queue of events to publish, and their encoding. Invariants: the feed never waits and holds a bounded
number of events; events that did not fit are counted and reported as LAGGED; a watcher sees its own tenant's events only.

A packed event has 73 bytes: kind `u8`, sequence `u64`, name of the space, hash; little-endian. The name is derived from tenant and
namespace together, so that equal namespaces of two tenants differ (see `space_name`).
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from attnstore.core.fair_share import FairShares
from attnstore.directory.members import EventBatch, is_name
from attnstore.errors import ProtocolError
from attnstore.limits import EVENTS_IN_BATCH_MAX, HASH_BYTES, NODE_ID_CHARS_MAX
from attnstore.types import PageEvent, PageEventKind, Space

_SPACE_PERSON = b"attnstore-sp-v1"
_EVENT = struct.Struct(f"<BQ{HASH_BYTES}s{HASH_BYTES}s")
_KINDS = frozenset(PageEventKind)


class EventFeed:
    """Events of one node with `tenants` tenants that are not published yet. Safe from any thread."""

    def __init__(self, node_id: str, tenants: int = 1) -> None:
        self._node_id = node_id
        self._tenants = tenants
        self._shares = self._new_shares()
        self._queue: deque[tuple[Space, PageEvent]] = deque()
        self._dropped = 0
        self._lock = threading.Lock()

    def offer(self, events: Iterable[tuple[Space, PageEvent]]) -> None:
        """Queues `(space, event)` pairs; those beyond their tenant's share of the next batch are dropped and counted."""
        with self._lock:
            for entry in events:
                tenant = entry[0].tenant
                if self._shares.fits(tenant):
                    self._shares.take(tenant)
                    self._queue.append(entry)
                else:
                    self._dropped += 1

    def take(self) -> EventBatch | None:
        """Returns everything that is queued, to be published now, or None if there is nothing."""
        with self._lock:
            queue, self._queue = self._queue, deque()
            self._shares = self._new_shares()
            dropped, self._dropped = self._dropped, 0
        if not queue and not dropped:
            return None
        names = {space: space_name(space) for space in {space for space, _ in queue}}
        packed = b"".join(_EVENT.pack(event.kind, event.sequence, names[space], event.hash) for space, event in queue)
        return EventBatch(self._node_id, packed, dropped)

    def _new_shares(self) -> FairShares:
        return FairShares(EVENTS_IN_BATCH_MAX, "events of a batch", "look at the pages", tenants=self._tenants)

    def lost(self, batch: EventBatch) -> None:
        """Counts the events of a batch that could not be published as dropped."""
        with self._lock:
            self._dropped += batch.dropped + len(batch.packed) // _EVENT.size


def check_events(batch: EventBatch) -> None:
    """Raises `ProtocolError` for a batch that no node can have packed."""
    good_size = len(batch.packed) % _EVENT.size == 0 and len(batch.packed) <= EVENTS_IN_BATCH_MAX * _EVENT.size
    if not (is_name(batch.node_id) and good_size and batch.dropped >= 0 and _KINDS.issuperset(batch.packed[:: _EVENT.size])):
        raise ProtocolError(f"the directory's events of node {batch.node_id[:NODE_ID_CHARS_MAX]!r} cannot be read")


def space_name(space: Space) -> bytes:
    """Returns 32 bytes that name a tenant's namespace: BLAKE2b-256, personalised `attnstore-sp-v1`, of the namespace and the
    tenant.
    """
    return hashlib.blake2b(space.namespace + space.tenant.encode(), digest_size=HASH_BYTES, person=_SPACE_PERSON).digest()


def events_in(batch: EventBatch, space: Space) -> Iterator[PageEvent]:
    """Returns the events of one space in a checked batch, followed by a LAGGED if any were dropped after them."""
    name = space_name(space)
    sequence = 0
    for kind, sequence, of_space, page_hash in _EVENT.iter_unpack(batch.packed):
        if of_space == name:
            yield PageEvent(PageEventKind(kind), page_hash, sequence)
    if batch.dropped:
        yield PageEvent(PageEventKind.LAGGED, b"", sequence, batch.dropped)
