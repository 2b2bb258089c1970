"""The asynchronous client: `async with attnstore.aio.connect(target) as client: ...`; same calls, same errors, one core."""

from __future__ import annotations

from pathlib import Path

from attnstore.client import AsyncClient, AsyncClusterClient, ClusterOptions, options_of
from attnstore.limits import DEADLINE_MS_DEFAULT

__all__ = ["AsyncClient", "AsyncClusterClient", "connect"]


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
    """An `AsyncClient` or `AsyncClusterClient` for the running event loop. Arguments as in `attnstore.connect`."""
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
    return AsyncClusterClient(options) if isinstance(options, ClusterOptions) else AsyncClient(options)
