"""The contracts between the worker and a store, at which tests inject a store that fails on purpose.

Owns: every protocol of a store: what a client must offer (`PageStore`, `LeaseStore`, `SharedStore`, `AttendStore`) and what a load
sees of the lower tiers (`PageSource`, `Lender`); and `open_store`, the one place where the worker opens a client. Invariant: no
other module of the worker describes a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import attnstore
from attnstore.client.base import OnLayer as OnLayer
from attnstore.client.cluster.attend import StoreAttention
from attnstore.client.options import TRANSPORT_NAMES
from attnstore.client.options import checked_target as checked_target
from attnstore.client.transports.mapped import PageViews
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.types import Lease, MatchResult, ReadResult, WriteResult
from attnstore_worker.cache.pool.block_table import LentBlocks

STORE_TRANSPORTS: Final = TRANSPORT_NAMES
"""The transports of page bytes; `auto` uses the best that the node offers."""


class PageStore(Protocol):
    """A store of sealed pages. Every call ends within its own deadline; all may be called from any thread.

    A namespace is registered once, before its first use. The client registers it again with a restarted node.
    """

    def register_layout(self, namespace: bytes, layout: PageLayout, /, *, deadline_ms: float | None = None) -> object:
        """Registers the namespace. Idempotent."""
        ...

    def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int, deadline_ms: float | None = None
    ) -> MatchResult:
        """Returns how many leading pages of each prefix are stored, and a lease on them."""
        ...

    def read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        /,
        *,
        lease: Lease | None,
        deadline_ms: float,
        on_layer: OnLayer | None = None,
    ) -> ReadResult:
        """Fills one buffer per page. After it has returned no buffer is written any more; pages that are not OK are misses.

        With `on_layer` the pages arrive layer by layer if the transport supports it; otherwise it is called for all layers at the
        end.
        """
        ...

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[memoryview], /, *, deadline_ms: float
    ) -> WriteResult:
        """Stores pages. Returns one verdict per page."""
        ...

    def release(self, lease: Lease, /) -> object:
        """Ends a lease."""
        ...


class LeaseStore(Protocol):
    """A store whose leases can be renewed."""

    def renew(self, lease: Lease, lease_ms: int, /) -> object:
        """Extends a lease to `lease_ms` from now. Raises `LeaseExpired`."""
        ...

    def release(self, lease: Lease, /) -> object:
        """Ends a lease."""
        ...


@runtime_checkable
class SharedStore(LeaseStore, Protocol):
    """A store whose pages can be used in place: `attnstore.Client` is one."""

    def view(self, namespace: bytes, hashes: Sequence[bytes], /, *, lease: Lease, deadline_ms: float) -> PageViews:
        """Returns the pages in place. Raises if the node is not on this host or offers no shared memory."""
        ...


@runtime_checkable
class AttendStore(Protocol):
    """A store whose nodes attend to their pages: a client of a node or of a cluster."""

    def register_layout(self, namespace: bytes, layout: PageLayout, /) -> object:
        """Registers the namespace. Idempotent."""
        ...

    def attention(self, namespace: bytes, /, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> StoreAttention:
        """Returns attention over pages that stay in the store; `namespace` is registered."""
        ...


@runtime_checkable
class LayerStore(Protocol):
    """A store that reads some layers of pages: a client of a node or of a cluster."""

    def read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        /,
        *,
        layers: tuple[int, int],
        deadline_ms: float,
    ) -> ReadResult:
        """Fills one buffer per page with its layers `[begin, end)`. Pages that are not OK are misses."""
        ...


class PageSource(Protocol):
    """The lower tiers as a load sees them. No method raises: pages that a source cannot return are misses."""

    def match(self, hashes: Sequence[BlockHash]) -> MatchResult:
        """Returns how many leading pages are stored, with a lease on them."""
        ...

    def read(
        self,
        hashes: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        lease: Lease | None,
        *,
        deadline_ms: float,
        on_layer: OnLayer | None = None,
    ) -> ReadResult:
        """Fills one buffer per page. After it has returned no buffer is written any more. `on_layer` as in `PageStore.read`."""
        ...

    def release(self, lease: Lease | None) -> None:
        """Ends a lease, if there is one."""
        ...


class Lender(Protocol):
    """A source whose pages can be used in place. No method raises."""

    def borrow(self, hashes: Sequence[BlockHash], lease: Lease) -> LentBlocks | None:
        """Returns all the pages, which keep the lease until they are released; or None, and the caller keeps the lease."""
        ...

    def close(self) -> None:
        """Ends all uses, soon."""
        ...


def open_store(
    target: str,
    *,
    deadline_ms: int,
    transport: str = "auto",
    shared_path: Path | None = None,
    http_proxy: str | None = None,
    tls_ca: Path | None = None,
) -> attnstore.Client | attnstore.ClusterClient:
    """Returns a client of the store node or cluster at `target` (see `attnstore.connect`): a `PageStore` and a context manager.

    Nothing is sent before its first call. `transport` is one of `STORE_TRANSPORTS`, `shared_path` the file of a node's arena on
    this host, `http_proxy` the URL of a proxy, `tls_ca` a file of certificates of the nodes' authorities. Raises `InvalidArgument`
    for a malformed target or a file that cannot be read.
    """
    return attnstore.connect(
        target, deadline_ms=deadline_ms, transport=transport, shared_path=shared_path, http_proxy=http_proxy, tls_ca=tls_ca
    )
