"""Which bulk transports a node offers, asked once, and the ones that a client has of them.

Owns: `BulkTransports`. Invariants: `close` closes every transport that was opened; none is opened before the node has offered it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from attnstore.client.base import BulkChoice, OpenChannel
from attnstore.client.options import ConnectOptions
from attnstore.client.transports.shm import ShmTransport
from attnstore.client.transports.tcp import TcpTransport
from attnstore.clock import Clock, Deadline
from attnstore.errors import ClientClosed, DeadlineExceeded
from attnstore.wire.shm import SHM_FILE_OFFER

Describe = Callable[[float], Awaitable[dict[str, str]]]
"""`describe(deadline_ms)`: the transports that the node offers, by name, with their addresses."""

AskChannel = Callable[[str, Deadline], Coroutine[Any, Any, tuple[str, bytes]]]
"""`ask(transport, deadline)`: address and one-time token of a bulk connection. Runs on the client's event loop."""


class BulkTransports:
    """The bulk transports between one client and one node; `choice` is which of them a call uses."""

    def __init__(self, options: ConnectOptions, clock: Clock, describe: Describe, ask: AskChannel) -> None:
        self._options = options
        self._describe = describe
        self._ask = ask
        self._negotiating = asyncio.Lock()
        self.choice = BulkChoice(options.transport, clock)
        self.tcp: TcpTransport | None = None
        self.shm: ShmTransport | None = None

    async def negotiate(self, deadline: Deadline) -> None:
        """Asks the node once which bulk transports it offers."""
        if self.choice.is_negotiated():
            return
        try:
            # Another call may be asking, with a later deadline than this one's.
            async with asyncio.timeout(deadline.left_ms() / 1000):
                await self._negotiating.acquire()
        except TimeoutError:
            raise DeadlineExceeded("the node did not say in time which transports it offers") from None
        try:
            if not self.choice.is_negotiated():
                self._take(await self._describe(deadline.left_ms()))
        finally:
            self._negotiating.release()

    def close(self) -> None:
        """Closes what was opened. Closing twice is harmless."""
        tcp, shm, self.tcp, self.shm = self.tcp, self.shm, None, None
        try:
            if tcp is not None:
                tcp.close()
        finally:
            if shm is not None:
                shm.close()

    def _take(self, offered: dict[str, str]) -> None:
        options, opener = self._options, self._opener(asyncio.get_running_loop())
        if "tcp" in offered:
            self.tcp = TcpTransport(options.target.address.host, opener, options.channels)
        offer = SHM_FILE_OFFER if options.shared_path is not None and SHM_FILE_OFFER in offered else "shm"
        if offer in offered and (options.transport == "shm" or ShmTransport.is_reachable(offered[offer])):
            self.shm = ShmTransport(opener, options.channels, offer, options.shared_path)
        transports = [transport for transport in (self.shm, self.tcp) if transport is not None]
        self.choice.offer(readers=transports, writers=transports, matchers=[] if self.tcp is None else [self.tcp])

    def _opener(self, loop: asyncio.AbstractEventLoop) -> OpenChannel:
        def open_channel(transport: str, deadline: Deadline) -> tuple[str, bytes]:
            answer = asyncio.run_coroutine_threadsafe(self._ask(transport, deadline), loop)
            try:
                return answer.result()
            except concurrent.futures.CancelledError:
                raise ClientClosed("the client is closed, or its event loop is ending") from None

        return open_channel
