"""The receiving half of a page write, for every transport: bytes go into the slot from which they will be read.

Owns: the verdict on each page of one write stream.
Invariant: a page is sealed only if exactly its layout's bytes arrived and match the announced checksum; a prepared slot is always
completed or aborted (`close` does it for the last one).
"""

from __future__ import annotations

from attnstore.core.page_table import Room
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import HASH_BYTES, HASHES_MAX
from attnstore.server.pinned_views import Arrival
from attnstore.server.store import Store
from attnstore.types import PageStatus, Space


class Ingest:
    """The pages of one write stream, one after the other: `begin`, `receive` until the page is complete, then the next `begin`."""

    def __init__(self, store: Store, space: Space) -> None:
        """Raises `NamespaceUnknown`."""
        self.space = space
        self._store = store
        self._page_bytes = store.layout_of(space).page_bytes
        self._verdicts: list[PageStatus] = []
        self._open = False
        self._arriving: Arrival | None = None
        self._verdict: PageStatus | None = None
        self._received_bytes = 0

    def begin(self, page_hash: bytes, checksum: int, age_ms: int = 0) -> bool:
        """Begins the next page. Returns False while space for it is being freed: call again. An unfinished previous page gets
        WRONG_SIZE. `age_ms` as in `PageTable.prepare`.

        Raises `InvalidArgument` for a malformed hash.
        """
        self._end_page()
        if len(page_hash) != HASH_BYTES:
            raise InvalidArgument(f"a block hash has {len(page_hash)} bytes; it must have {HASH_BYTES}")
        if len(self._verdicts) == HASHES_MAX:
            raise InvalidArgument(f"one write stream carries at most {HASHES_MAX} pages; open another")
        outcome = self._store.try_prepare(self.space, page_hash, checksum, age_ms)
        if outcome is Room.MAKING:
            return False
        self._open = True
        self._received_bytes = 0
        if isinstance(outcome, PageStatus):
            self._verdict = outcome
        else:
            self._arriving = outcome
            self._verdict = None
        return True

    def receive(self, offset_bytes: int, payload: memoryview) -> None:
        """Takes the next bytes of the page. Raises `ProtocolError` outside a page or out of order."""
        if not self._open:
            raise ProtocolError("page bytes arrived before the hash of their page")
        if offset_bytes != self._received_bytes:
            raise ProtocolError(f"page bytes at offset {offset_bytes} arrived where {self._received_bytes} was next")
        end = offset_bytes + len(payload)
        self._received_bytes = end
        if self._arriving is None:
            if self._verdict is PageStatus.STORED:
                raise ProtocolError(f"more than the layout's {self._page_bytes} bytes arrived for one page")
            return
        if end > self._page_bytes:
            self._reject(PageStatus.WRONG_SIZE)
            return
        self._arriving.data[offset_bytes:end] = payload
        if end == self._page_bytes:
            arriving, self._arriving = self._arriving, None
            self._verdict = self._store.seal(arriving)

    def finish(self) -> tuple[PageStatus, ...]:
        """Ends the stream. Returns the verdicts in the order of the pages."""
        self._end_page()
        return tuple(self._verdicts)

    def close(self) -> None:
        """Frees the slot of an unfinished page. May be called at any time, any number of times."""
        if self._arriving is not None:
            self._reject(PageStatus.WRONG_SIZE)

    def _reject(self, verdict: PageStatus) -> None:
        assert self._arriving is not None
        self._store.abort(self._arriving)
        self._arriving = None
        self._verdict = verdict

    def _end_page(self) -> None:
        if not self._open:
            return
        self.close()
        assert self._verdict is not None
        self._verdicts.append(self._verdict)
        self._open = False
