"""Opens a directory by its URL. Imports the Redis client only if needed, because it is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attnstore.directory.base import Directory
from attnstore.directory.url import DirectoryUrl
from attnstore.extras import needs_extra

if TYPE_CHECKING:
    from attnstore.cluster_key import ClusterKey


def open_directory(url: str, *, key: ClusterKey | None = None, tls_only: bool = False) -> Directory:
    """Returns the directory at `url` (see `attnstore.directory.url`), for the running event loop; nothing is sent yet.

    With the cluster's `key`, records are signed and only signed records are believed. With `key=` in the URL, only signed records
    are believed. With `tls_only`, nodes without TLS are ignored.

    Raises `InvalidArgument` for a malformed URL, for keys that are not a pair, or if the extra `redis` is not installed.
    """
    return checked_directory(url, key=key, tls_only=tls_only)()


def checked_directory(url: str, *, key: ClusterKey | None = None, tls_only: bool = False) -> Callable[[], Directory]:
    """Returns a function that opens the directory at `url`. Raises as `open_directory` does, now."""
    parsed = DirectoryUrl.parse(url)
    with needs_extra("redis", "a directory on Redis or Valkey"):
        from attnstore.cluster_key import PublicKey
        from attnstore.directory.redis import RedisDirectory
        from attnstore.directory.trust import Trust
    public = None if parsed.key is None else PublicKey.read(parsed.key)
    trust = Trust(parsed.cluster, public, key, tls_only=tls_only)
    return lambda: RedisDirectory(parsed, trust)


def load_cluster_key(path: Path, *, create: bool = False) -> ClusterKey:
    """Reads the cluster's key from a file, which `create` creates if it is missing. Raises `InvalidArgument`, also for a missing
    extra.
    """
    with needs_extra("redis", "a cluster's key"):
        from attnstore.cluster_key import ClusterKey
    return ClusterKey.create(path) if create and not path.exists() else ClusterKey.load(path)
