"""Opens a directory by its URL, importing the client of Redis only where one is asked for: it is an optional dependency."""

from __future__ import annotations

from attnstore.directory.base import Directory
from attnstore.directory.url import DirectoryUrl
from attnstore.errors import InvalidArgument


def open_directory(url: str) -> Directory:
    """The directory at `url` (see `attnstore.directory.url`), for the running event loop; nothing is sent yet.

    Raises `InvalidArgument` for a malformed URL, or where the extra `redis` is not installed.
    """
    parsed = DirectoryUrl.parse(url)
    try:
        from attnstore.directory.redis import RedisDirectory
    except ImportError:
        raise InvalidArgument("a directory on Redis or Valkey needs the extra: pip install 'attnstore[redis]'") from None
    return RedisDirectory(parsed)
