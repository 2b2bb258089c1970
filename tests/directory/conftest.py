"""Both kinds of directory: in memory with a clock of the test's, and on every real server that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from attnstore.directory import Directory, MemoryDirectory, open_directory
from attnstore.testing import RedisServer, server_binaries

BINARIES = server_binaries()
SERVERS = [pytest.param(name, marks=pytest.mark.redis) for name in BINARIES]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(binary=BINARIES[request.param]) as server:
        yield server


@pytest.fixture(params=["memory", *SERVERS])
async def directory(request: pytest.FixtureRequest) -> AsyncIterator[Directory]:
    """An empty directory."""
    if request.param == "memory":
        yield MemoryDirectory()
        return
    with RedisServer(binary=BINARIES[request.param]) as server:
        directory = open_directory(server.url)
        yield directory
        await directory.close()
