"""What the worker needs of a store: the seam at which tests inject a store that fails on purpose.

Owns: `PageStore`, and `open_store`, the one place where the worker opens a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import attnstore
from attnstore.client.base import TRANSPORT_NAMES
from attnstore.client.base import OnLayer as OnLayer
from attnstore.client.options import checked_target as checked_target
from attnstore.core.layout import PageLayout
from attnstore.types import Lease, MatchResult, ReadResult, WriteResult

STORE_TRANSPORTS: Final = TRANSPORT_NAMES
"""How page bytes may travel; `auto` takes the best that the node offers."""


class PageStore(Protocol):
    """A store of sealed pages. Every call ends within a deadline of its own; all may be called from any thread."""

    def register_layout(self, namespace: bytes, layout: PageLayout, /, *, deadline_ms: float | None = None) -> object:
        """Makes the namespace known. Idempotent."""
        ...

    def match(self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int) -> MatchResult:
        """How many leading pages of each prefix are there, and a lease on them."""
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
        """Fills one buffer per page. After it returned no buffer is written any more; pages that are not OK are misses.

        With `on_layer` the pages come layer by layer where the transport can, else it is called for all layers at the end.
        """
        ...

    def write(self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[memoryview], /, *, deadline_ms: int) -> WriteResult:
        """Stores pages; one verdict each."""
        ...

    def release(self, lease: Lease, /) -> object:
        """Ends a lease."""
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
    """A client of the store node or cluster at `target` (see `attnstore.connect`): a `PageStore` and a context manager.

    Nothing is sent before its first call. `transport` is one of `STORE_TRANSPORTS`, `shared_path` the file of a node's arena on
    this host, `http_proxy` the URL of a proxy to go through, `tls_ca` a file of certificates of the nodes' authorities. Raises
    `InvalidArgument` for a malformed target or a file that cannot be read.
    """
    return attnstore.connect(
        target, deadline_ms=deadline_ms, transport=transport, shared_path=shared_path, http_proxy=http_proxy, tls_ca=tls_ca
    )
