"""The limit of grpcio: a stream of ready-made messages with the size of the store's chunks, and nothing else.

grpc.aio on uvloop on both sides, as in the store; the serializers are the identity, so no byte of a message is touched. The
messages are made from the same pages as in every other lane, so that they come from memory like the store's, not from a cache.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from attnstore.limits import CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX
from experiments.bandwidth.lane import Start, serve_lane
from experiments.bandwidth.pages import PageBuffers, Shape, expected
from experiments.bandwidth.processes import say_and_wait

_SERVICE = "bare.Pages"
_RANGE = struct.Struct("<II")
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
)


class GrpcBareLane:
    """The client. Received messages are dropped; nothing is copied into buffers."""

    def __init__(self, start: Start) -> None:
        self._pages = _messages_of_pages(start.shape)
        self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._connect(start.address))
        self.verbs = {"grpc_bare read": self._read, "grpc_bare write": self._write}
        self.landing: dict[str, PageBuffers] = {}

    async def _connect(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._reading: Any = self._channel.unary_stream(f"/{_SERVICE}/Read")
        self._writing: Any = self._channel.stream_unary(f"/{_SERVICE}/Write")
        await self._channel.channel_ready()

    def begin_pass(self) -> None:
        """No-op: nothing is kept."""

    def _read(self, begin: int, end: int) -> None:
        async def read() -> None:
            call = self._reading(_RANGE.pack(begin, end))
            while await call.read() is not grpc.aio.EOF:
                pass

        self._loop.run_until_complete(read())

    def _write(self, begin: int, end: int) -> None:
        async def write() -> None:
            call = self._writing()
            for messages in self._pages[begin:end]:
                for message in messages:
                    await call.write(message)
            await call.done_writing()
            await call

        self._loop.run_until_complete(write())


async def serve(start: Start) -> None:
    """The server."""
    pages = _messages_of_pages(start.shape)

    async def read(request: bytes, context: Any) -> None:
        begin, end = _RANGE.unpack(request)
        for messages in pages[begin:end]:
            for message in messages:
                await context.write(message)

    async def write(_requests: AsyncIterator[bytes], context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return b""

    handlers: dict[str, Any] = {
        "Read": grpc.unary_stream_rpc_method_handler(read),
        "Write": grpc.stream_unary_rpc_method_handler(write),
    }
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await asyncio.to_thread(say_and_wait, f"127.0.0.1:{port}")
    await server.stop(None)


def _messages_of_pages(shape: Shape) -> list[list[bytes]]:
    """Returns the messages that carry each page: full chunks and the rest."""
    contents = (expected(index, shape.page_bytes) for index in range(shape.pages))
    return [[page[offset : offset + CHUNK_BYTES_MAX] for offset in range(0, len(page), CHUNK_BYTES_MAX)] for page in contents]


if __name__ == "__main__":
    START = Start.from_arguments()
    if START.variant == "server":
        uvloop.run(serve(START))
    else:
        serve_lane(GrpcBareLane(START), START)
