"""The services that require no token: health and reflection.

Owns: the number of their running streams. Invariants: at most `OPEN_STREAMS_MAX` streams run, and the oldest is closed for the
next; a peer that does not read delays nobody, although the library's health service holds a lock while it writes, which every
change of the health status needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from attnstore.limits import OPEN_STREAMS_MAX, OPEN_WRITE_MS_MAX

_TOO_MANY = f"a newer stream took the place of this one: at most {OPEN_STREAMS_MAX} streams of health and reflection run"
_LibraryReflection: Any = reflection.aio.ReflectionServicer  # its stubs take the generator for a coroutine


class OpenServices:
    """Adds both services to a server."""

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        streams = _Streams()
        self._services = ("", *services)
        self._health = _Health(streams)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            _Reflection(streams, names), server
        )

    async def serving(self) -> None:
        """Reports the node as healthy from now on."""
        for service in self._services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def draining(self) -> None:
        """Reports the node as unhealthy from now on, for good."""
        await self._health.enter_graceful_shutdown()


class _Streams:
    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any] | None, None] = {}  # the oldest first

    @asynccontextmanager
    async def place(self, context: Any) -> AsyncIterator[None]:
        """Gives the running call a place for the duration of the block. A call that loses its place to a newer one ends with
        RESOURCE_EXHAUSTED.
        """
        if len(self._running) >= OPEN_STREAMS_MAX:
            oldest = next(iter(self._running))
            del self._running[oldest]
            if oldest is not None:
                oldest.cancel()
        task = asyncio.current_task()
        self._running[task] = None
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._running:
                # gRPC sends no status for a cancelled call: its peer would go on waiting.
                with suppress(TimeoutError):
                    async with asyncio.timeout(OPEN_WRITE_MS_MAX / 1000):
                        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
            raise
        finally:
            self._running.pop(task, None)


class _Health(health.aio.HealthServicer):
    def __init__(self, streams: _Streams) -> None:
        super().__init__()
        self._streams = streams

    async def Watch(self, request: Any, context: Any) -> None:
        async with self._streams.place(context):
            writer: Any = _Writer(context)
            await super().Watch(request, writer)


class _Writer:
    """The context of a call whose writes are bounded in time."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def write(self, message: Any) -> None:
        async with asyncio.timeout(OPEN_WRITE_MS_MAX / 1000):
            await self._context.write(message)


class _Reflection(_LibraryReflection):  # type: ignore[misc]
    def __init__(self, streams: _Streams, names: Sequence[str]) -> None:
        super().__init__(service_names=names)
        self._streams = streams

    async def ServerReflectionInfo(self, requests: AsyncIterable[Any], context: Any) -> AsyncIterator[Any]:
        async with self._streams.place(context):
            async for answer in super().ServerReflectionInfo(requests, context):
                yield answer
