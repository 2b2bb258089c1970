"""The attend frames of one page channel: received into reused memory, answered from the memory of the result.

Owns: the session of the connection, created with its first set. Invariants: handling a query allocates no memory of its size; the
payload is read off the stream before the request can be refused, so the next frame starts at a frame boundary.
"""

from __future__ import annotations

from collections.abc import Callable

from attnstore.core.hashing import joint_checksum, page_checksum
from attnstore.errors import DeadlineExceeded, ProtocolError, Unsupported
from attnstore.server.attend import Attending, AttendSession
from attnstore.streams.frames import FrameStream
from attnstore.telemetry import NodeMetrics
from attnstore.wire.attend import AttendClose, decode_open, decode_query
from attnstore.wire.page_channel import Frame, Kind, encode_frame, encode_refusal

NOT_OFFERED = "this node does not attend: install attnstore[attention] on it and do not start it with --attend-threads 0"


class AttendChannel:
    """With `attending=None`, every frame is refused with `Unsupported`."""

    def __init__(self, stream: FrameStream, attending: Attending | None, metrics: NodeMetrics) -> None:
        self._stream = stream
        self._attending = attending
        self._metrics = metrics
        self._session: AttendSession | None = None
        self._kept = bytearray()
        self.answers: dict[Kind, Callable[[Frame, str], None]] = {
            Kind.ATTEND_OPEN: self._open,
            Kind.ATTEND: self._query,
            Kind.ATTEND_CLOSE: self._close_set,
        }

    @property
    def has_sets(self) -> bool:
        """Whether the peer has open sets and therefore expects the connection to stay."""
        return self._session is not None and self._session.sets > 0

    def close(self) -> None:
        """Closes all sets."""
        if self._session is not None:
            self._session.close()

    def _open(self, frame: Frame, tenant: str) -> None:
        payload = self._payload(frame)
        if self._session is None:
            if self._attending is None:
                raise Unsupported(NOT_OFFERED)
            self._session = self._attending.session(tenant)
        self._session.open(decode_open(frame.page, frame.namespace, frame.lease, payload))
        self._stream.send(encode_frame(Frame(Kind.OPENED, request=frame.request, page=frame.page)))

    def _query(self, frame: Frame, _tenant: str) -> None:
        payload = self._payload(frame)
        if self._attending is None:
            raise Unsupported(NOT_OFFERED)
        if page_checksum(payload) != frame.checksum:
            raise ProtocolError("an ATTEND frame's payload does not match its checksum")
        query = decode_query(frame.layer_begin, frame.offset_bytes, frame.page, payload)
        try:
            parts = self._required_session().answer(query)
        except DeadlineExceeded as error:
            # The error belongs to the query, not to the connection: the client receives it like any other refusal.
            self._stream.send(encode_refusal(frame.request, error))
            return
        size_bytes = sum(map(len, parts))
        header = Frame(Kind.PARTIAL, request=frame.request, size_bytes=size_bytes, checksum=joint_checksum(parts))
        self._stream.send(encode_frame(header), *parts)
        self._metrics.attended("tcp", query.total_rows)

    def _close_set(self, frame: Frame, _tenant: str) -> None:
        if self._session is not None:
            self._session.close_set(AttendClose(frame.page))

    def _required_session(self) -> AttendSession:
        if self._session is None:
            raise ProtocolError("an ATTEND frame came before the first ATTEND_OPEN")
        return self._session

    def _payload(self, frame: Frame) -> memoryview:
        if len(self._kept) < frame.size_bytes:
            self._kept = bytearray(frame.size_bytes)
        payload = memoryview(self._kept)[: frame.size_bytes]
        if payload:
            self._stream.receive(payload)
        return payload
