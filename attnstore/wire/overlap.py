"""One gRPC operation in flight while the next message is made or the last one is used.

Owns: `SendAhead` and `receive_ahead`. gRPC moves the bytes of a message on threads of its own, so a stream that encodes or copies a
page only after the operation before it has ended leaves one side idle all the time; a bare stream of ready-made bytes does not.
Invariant: at most one operation is in flight beside what the caller does, and none is left behind when the caller leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc


class SendAhead:
    """`async with SendAhead(call.write) as stream: await stream.send(message)`: returns once the message *before* has been taken.

    Leaving the block waits for the last message; leaving it with an error abandons it.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._sending: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self._settle()
        elif self._sending is not None:
            await abandon(self._sending)

    async def send(self, message: bytes) -> None:
        """Waits for the message before, then starts this one. Raises what the one before has met."""
        await self._settle()
        self._sending = asyncio.ensure_future(self._write(message))

    async def _settle(self) -> None:
        if self._sending is not None:
            await self._sending
            self._sending = None


async def receive_ahead(read: Callable[[], Awaitable[Any]]) -> AsyncGenerator[Any, None]:
    """Messages until the end of the stream; the next one is on its way while the caller works on the last. Close it explicitly."""
    receiving = asyncio.ensure_future(read())
    try:
        while (message := await receiving) is not grpc.aio.EOF:
            receiving = asyncio.ensure_future(read())
            yield message
    finally:
        await abandon(receiving)


async def abandon(operation: asyncio.Future[Any]) -> None:
    """Ends an operation whose outcome interests nobody any more, and waits until it has ended."""
    operation.cancel()
    await asyncio.wait([operation])
    if not operation.cancelled():
        operation.exception()
