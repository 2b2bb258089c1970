"""Opens a directory by its URL, importing the client of Redis only where one is asked for: it is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable

from attnstore.directory.base import Directory
from attnstore.directory.url import DirectoryUrl
from attnstore.extras import needs_extra


def open_directory(url: str) -> Directory:
    """The directory at `url` (see `attnstore.directory.url`), for the running event loop; nothing is sent yet.

    Raises `InvalidArgument` for a malformed URL, or where the extra `redis` is not installed.
    """
    return checked_directory(url)()


def checked_directory(url: str) -> Callable[[], Directory]:
    """Opens the directory at `url` when it is called. Raises as `open_directory`, now."""
    parsed = DirectoryUrl.parse(url)
    with needs_extra("redis", "a directory on Redis or Valkey"):
        from attnstore.directory.redis import RedisDirectory
    return lambda: RedisDirectory(parsed)
