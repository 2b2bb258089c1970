"""AttnStore: a network Attention store for LLM inference. This module is the public API.

>>> import attnstore
>>> layout = attnstore.PageLayout(layers=2, kv_heads=1, head_dim=8, dtype=attnstore.DType.FP32)
>>> namespace = attnstore.namespace(layout, model=b"my-model")
>>> hashes = attnstore.block_hashes(namespace, range(32), layout.block_tokens)
>>> pages = [bytes([number]) * layout.page_bytes for number in range(len(hashes))]
>>> with attnstore.connect(store_url, deadline_ms=5_000) as client:  # for example "grpc://127.0.0.1:7400"
...     _ = client.register_layout(namespace, layout)
...     written = client.write(namespace, hashes, pages)
...     found = client.match(namespace, [hashes], lease_ms=5_000)
...     buffers = [bytearray(layout.page_bytes) for _ in hashes]
...     answer = client.read(namespace, hashes, buffers, lease=found.lease)
...     _ = client.release(found.lease)
>>> [verdict.name for verdict in written.verdicts], found.hits, answer.leading_hits, buffers == pages
(['STORED', 'STORED'], (2,), 2, True)
"""

from __future__ import annotations

from pathlib import Path

from attnstore.client import Client, ClusterClient, ClusterOptions, NodeConnection, options_of
from attnstore.core.hashing import BlockHash, Namespace, block_hash, block_hashes, namespace, page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import AttnStoreError
from attnstore.limits import DEADLINE_MS_DEFAULT
from attnstore.statistics import NodeStatistics
from attnstore.types import (
    Lease,
    MatchResult,
    NodeDescription,
    PageEvent,
    PageEventKind,
    PageStatus,
    ReadResult,
    WriteResult,
)

__all__ = [
    "AttnStoreError",
    "BlockHash",
    "Client",
    "ClusterClient",
    "DType",
    "Lease",
    "MatchResult",
    "Namespace",
    "NodeDescription",
    "NodeStatistics",
    "PageEvent",
    "PageEventKind",
    "PageLayout",
    "PageStatus",
    "ReadResult",
    "WriteResult",
    "block_hash",
    "block_hashes",
    "connect",
    "namespace",
    "page_checksum",
]


def connect(
    target: str,
    *,
    deadline_ms: float = DEADLINE_MS_DEFAULT,
    token: str | None = None,
    tls_ca: str | Path | None = None,
    transport: str = "auto",
    channels: int = 1,
    shared_path: str | Path | None = None,
    http_proxy: str | None = None,
) -> Client | ClusterClient:
    """Returns a blocking client of a store node or of a cluster. `target` is one of

    - `grpc://host:port`, or `grpcs://host:port` for TLS: one node;
    - `grpc://a:7400,b:7400`: a cluster of these nodes, followed by `?replicas=2` for two copies of each page;
    - `redis://host:port/0`, or one of the other forms in `attnstore.directory.url`: the cluster of this directory.

    `deadline_ms` is the deadline of every call that names none. `token` defaults to the environment's `ATTNSTORE_TOKEN`; `tls_ca`
    is a PEM file of trusted authorities (default: the system's).

    `transport` selects how page bytes are moved: `auto` uses the best transport that the node offers and falls back to gRPC with a
    warning; `grpc`, `tcp` and `shm` are forced. `channels` is the maximum number of page channels for one large transfer.
    `shared_path` is the `--arena-path` of a node on this host: such a file is mapped only if you name it, because truncating it
    would kill its readers.

    `http_proxy` is the URL of an HTTP proxy, for gRPC only; proxies named in the environment are not used. Nothing is sent before
    the first call. Raises `errors.InvalidArgument` for a malformed argument.
    """
    options = options_of(
        target,
        deadline_ms=deadline_ms,
        token=token,
        tls_ca=tls_ca,
        transport=transport,
        channels=channels,
        shared_path=shared_path,
        http_proxy=http_proxy,
    )
    return ClusterClient(options) if isinstance(options, ClusterOptions) else Client(NodeConnection(options))
