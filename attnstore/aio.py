"""The asynchronous client: `async with attnstore.aio.connect(target) as client: ...`; the same calls and errors as the blocking
one.
"""

from __future__ import annotations

from pathlib import Path

from attnstore.client import AsyncClient, AsyncClusterClient, ClusterOptions, NodeConnection, options_of
from attnstore.client.options import ConnectOptions
from attnstore.directory import Member
from attnstore.directory.trust import MemberCheck
from attnstore.limits import DEADLINE_MS_DEFAULT

__all__ = ["AsyncClient", "AsyncClusterClient", "connect", "connect_member"]


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
) -> AsyncClient | AsyncClusterClient:
    """Returns an `AsyncClient` or `AsyncClusterClient` for the running event loop. Arguments as in `attnstore.connect`."""
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
    return AsyncClusterClient(options) if isinstance(options, ClusterOptions) else AsyncClient(NodeConnection(options))


def connect_member(
    member: Member,
    check: MemberCheck | None,
    *,
    token: str | None,
    tls_ca: str | Path | None,
    deadline_ms: float = DEADLINE_MS_DEFAULT,
    transport: str = "auto",
    http_proxy: str | None = None,
) -> AsyncClient:
    """Returns a client of one node of a cluster. The node must pass the check before it receives the token or anything else.

    `tls_ca` is for a node with TLS. Calls raise `Unavailable` if the check fails.
    """
    options = ConnectOptions.create(
        member.url,
        deadline_ms=deadline_ms,
        token=token,
        tls_ca=tls_ca if member.url.startswith("grpcs://") else None,
        transport=transport,
        channels=1,
        http_proxy=http_proxy,
    )
    return AsyncClient(NodeConnection(options.at(member, check)))
