"""The client's half of an attend stream: opens sets of pages at a node, sends queries to a layer, receives the partial results.

Owns: `AttendStream` over a page channel of its own, and `AttendCall` over gRPC, which `BlockingAttend` adapts to an `AttendStream`.
Invariant: partials are written to the caller's memory only within `receive`, verified. The caller closes a stream that raised, and
opens another to continue.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from attnstore.client.transports.rpc import AttendRpc
from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import joint_checksum
from attnstore.errors import ClientClosed, ProtocolError, Unavailable
from attnstore.limits import ATTEND_SPIN_MS
from attnstore.streams.frames import FrameStream
from attnstore.types import Lease
from attnstore.wire.attend import (
    AttendClose,
    AttendOpen,
    AttendShape,
    AttendStep,
    encode_open,
    encode_sets,
    partial_from_wire,
    query_of,
    step_to_wire,
)
from attnstore.wire.chunks import Buffer
from attnstore.wire.page_channel import Frame, Kind, decode_refusal, encode_frame, next_request

R = TypeVar("R")

_SET_IDS_MAX: Final = 1 << 32


class _Stream(ABC):
    """The common part of both kinds of stream."""

    def __init__(self) -> None:
        self.closed = False

    @abstractmethod
    def close(self) -> None:
        """See `AttendStream.close`."""

    @abstractmethod
    def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.send_open`."""

    @abstractmethod
    def receive_opened(self, set_id: int) -> None:
        """See `AttendStream.receive_opened`."""

    def open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.open`."""
        set_id = self.send_open(hashes, lease)
        self.receive_opened(set_id)
        return set_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class ChannelAttend(_Stream):
    """An `AttendStream` over a page channel of its own, after WELCOME."""

    def __init__(self, stream: FrameStream, shape: AttendShape, clock: Clock, deadline_ms: float) -> None:
        super().__init__()
        self._stream = stream
        self._shape = shape
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._deadline = Deadline(clock, deadline_ms)
        self._request = 0
        self._set_ids = itertools.count()
        stream.bound(self._left_ms)
        stream.spins(ATTEND_SPIN_MS)

    def close(self) -> None:
        """See `AttendStream.close`."""
        self.closed = True
        self._stream.abort()

    def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.send_open`."""
        set_id = next(self._set_ids) % _SET_IDS_MAX
        payload = encode_open(AttendOpen(set_id, self._shape, hashes, lease.lease_id))
        self._begin()
        frame = Frame(
            Kind.ATTEND_OPEN,
            request=self._request,
            page=set_id,
            size_bytes=len(payload),
            namespace=self._shape.namespace,
            lease=lease.lease_id,
        )
        self._stream.send(encode_frame(frame), payload)
        return set_id

    def receive_opened(self, set_id: int) -> None:
        """See `AttendStream.receive_opened`."""
        if self._receive(Kind.OPENED).page != set_id:
            raise ProtocolError("the node opened another set than it was asked for")

    def ask(self, layer: int, sets: Sequence[tuple[int, int]], rows: Buffer, firsts: Sequence[int] = ()) -> None:
        """See `AttendStream.ask`."""
        self._begin()
        query = query_of(layer, _budget_ms(self._deadline_ms), sets, rows, firsts)
        parts = (encode_sets(query.sets, windowed=query.windowed), memoryview(query.rows).cast("B"))
        frame = Frame(
            Kind.ATTEND,
            request=self._request,
            page=len(sets),
            size_bytes=sum(map(len, parts)),
            offset_bytes=query.budget_ms,
            checksum=joint_checksum(parts),
            layer_begin=layer,
        )
        self._stream.send(encode_frame(frame), *parts)

    def receive(self, out: memoryview, lse: memoryview) -> None:
        """See `AttendStream.receive`."""
        frame = self._receive(Kind.PARTIAL)
        if frame.size_bytes != len(out) + len(lse):
            raise ProtocolError(f"the node's partial has {frame.size_bytes} bytes where {len(out) + len(lse)} are due")
        self._stream.receive(out, lse)
        if joint_checksum((out, lse)) != frame.checksum:
            raise Unavailable("the partial that came does not have its checksum")

    def close_set(self, set_id: int) -> None:
        """See `AttendStream.close_set`."""
        self._begin()
        self._stream.send(encode_frame(Frame(Kind.ATTEND_CLOSE, request=self._request, page=set_id)))

    def _begin(self) -> None:
        self._request = next_request(self._request)
        self._deadline = Deadline(self._clock, self._deadline_ms)

    def _left_ms(self) -> float:
        return self._deadline.left_ms()

    def _receive(self, expected: Kind) -> Frame:
        frame = self._stream.receive()
        if frame.kind is Kind.REFUSED:
            reason = bytearray(frame.size_bytes)
            if reason:
                self._stream.receive(memoryview(reason))
            raise decode_refusal(reason)
        if frame.kind is not expected or frame.request != self._request:
            raise ProtocolError(
                f"a {frame.kind.name} frame of request {frame.request} came where {expected.name} of {self._request} was due"
            )
        return frame


class AttendCall:
    """An attend stream over gRPC, for the event loop. Methods as in `AttendStream`, awaited."""

    def __init__(self, call: AttendRpc, shape: AttendShape, deadline_ms: float) -> None:
        self._call = call
        self._shape = shape
        self._deadline_ms = deadline_ms
        self._set_ids = itertools.count()

    async def open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.open`."""
        set_id = await self.send_open(hashes, lease)
        await self.receive_opened(set_id)
        return set_id

    async def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.send_open`."""
        set_id = next(self._set_ids) % _SET_IDS_MAX
        await self._send(AttendOpen(set_id, self._shape, hashes, lease.lease_id))
        return set_id

    async def receive_opened(self, set_id: int) -> None:
        """See `AttendStream.receive_opened`."""
        answer = await self._call.read()
        if answer.WhichOneof("step") != "opened" or answer.opened.set != set_id:
            raise ProtocolError("the node did not answer an open with the set that was asked for")

    async def ask(self, layer: int, sets: Sequence[tuple[int, int]], rows: Buffer, firsts: Sequence[int] = ()) -> None:
        """See `AttendStream.ask`."""
        await self._send(query_of(layer, _budget_ms(self._deadline_ms), sets, memoryview(rows).cast("B"), firsts))

    async def receive(self, out: memoryview, lse: memoryview) -> None:
        """See `AttendStream.receive`."""
        came_out, came_lse = partial_from_wire(await self._call.read())
        if (len(came_out), len(came_lse)) != (len(out), len(lse)):
            raise ProtocolError(f"a partial came of {len(came_out)} and {len(came_lse)} bytes, not {len(out)} and {len(lse)}")
        out[:] = came_out
        lse[:] = came_lse

    async def close_set(self, set_id: int) -> None:
        """See `AttendStream.close_set`."""
        await self._send(AttendClose(set_id))

    async def close(self) -> None:
        """Closes the stream."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, step: AttendStep) -> None:
        await self._call.write(step_to_wire(step))


class BlockingAttend(_Stream):
    """An `AttendCall` as an `AttendStream`: `run` runs a coroutine on the call's event loop and waits for it."""

    def __init__(self, call: AttendCall, run: Callable[[Coroutine[Any, Any, R]], R]) -> None:
        super().__init__()
        self._call = call
        self._run: Callable[[Coroutine[Any, Any, Any]], Any] = run

    def close(self) -> None:
        """See `AttendStream.close`."""
        self.closed = True
        with suppress(ClientClosed):
            self._run(self._call.close())

    def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """See `AttendStream.send_open`."""
        return int(self._run(self._call.send_open(hashes, lease)))

    def receive_opened(self, set_id: int) -> None:
        """See `AttendStream.receive_opened`."""
        self._run(self._call.receive_opened(set_id))

    def ask(self, layer: int, sets: Sequence[tuple[int, int]], rows: Buffer, firsts: Sequence[int] = ()) -> None:
        """See `AttendStream.ask`."""
        self._run(self._call.ask(layer, sets, rows, firsts))

    def receive(self, out: memoryview, lse: memoryview) -> None:
        """See `AttendStream.receive`."""
        self._run(self._call.receive(out, lse))

    def close_set(self, set_id: int) -> None:
        """See `AttendStream.close_set`."""
        self._run(self._call.close_set(set_id))


def _budget_ms(deadline_ms: float) -> int:
    """Returns whole milliseconds for the node; at least one, because 0 would mean no limit."""
    return max(1, int(deadline_ms))
