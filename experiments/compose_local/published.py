"""Published ports: connections to this machine, forwarded to a service in its network namespace.

Owns: the listening sockets and the relayed connections. Invariant: both ends of a connection close together.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from attnstore.address import Address
from attnstore.testing.netns import Host

_CHUNK_BYTES: Final = 64 << 10


class PortRelay:
    """Relays on an event loop thread; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="published-ports", daemon=True)
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def publish(self, listen: Address, host: Host, port: int) -> Address:
        """Listens on `listen` (port 0: a free one) for `port` of `host`. Returns the address. Raises `OSError` if it is in use."""
        return asyncio.run_coroutine_threadsafe(self._publish(listen, host, port), self._loop).result()

    async def _publish(self, listen: Address, host: Host, port: int) -> Address:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # A socket belongs to the network namespace in which it was created, wherever it is used.
            with host.entered():
                inside = socket.socket()
            inside.setblocking(False)
            try:
                await self._loop.sock_connect(inside, (host.address, port))
                far_reader, far_writer = await asyncio.open_connection(sock=inside)
            except OSError:
                inside.close()
                writer.close()
                return
            with suppress(asyncio.CancelledError):  # the cluster ends
                await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))

        listeners = listen.listen()
        self._servers += [await asyncio.start_server(relay, sock=listener) for listener in listeners]
        return listen.at(listeners[0].getsockname()[1])

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        own = asyncio.current_task()
        for task in asyncio.all_tasks() - {own}:
            task.cancel()
        await asyncio.gather(*(asyncio.all_tasks() - {own}), return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    writer.close()
