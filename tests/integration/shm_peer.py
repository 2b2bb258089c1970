"""Peers of the shared memory socket, on either side, that follow the protocol only as far as a test requires."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import Unavailable
from attnstore.streams.shm import Message, ShmStream
from attnstore.testing import StoreProcess
from attnstore.types import PageStatus
from attnstore.wire import messages, shm
from attnstore.wire.shm import ExtentLayout, Kind, Place, State

WAIT_MS = 10_000.0


def open_channel(node: StoreProcess, token: str | None = None) -> tuple[str, bytes]:
    """Returns socket path and one-time token from the node."""
    method = messages.METHODS["OpenChannel"]
    with grpc.insecure_channel(node.address) as channel:
        call = channel.unary_unary(
            method.path, request_serializer=method.encode_request, response_deserializer=method.decode_response
        )
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        answer = call(messages.OpenChannelRequest(transport="shm"), timeout=WAIT_MS / 1000, metadata=metadata)
    return answer.address, answer.token


@dataclass
class Peer:
    """A connected socket; `greeted` once the node has sent WELCOME."""

    connection: socket.socket
    stream: ShmStream = field(init=False)
    extent_bytes: int = 0

    def __post_init__(self) -> None:
        self.stream = ShmStream(self.connection)
        self.stream.bound(Deadline(MonotonicClock(), WAIT_MS).left_ms)

    @classmethod
    def connected(cls, address: str) -> Peer:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(WAIT_MS / 1000)
        connection.connect(address)
        return cls(connection)

    @classmethod
    def greeted(cls, node: StoreProcess, token: str | None = None) -> Peer:
        address, channel_token = open_channel(node, token)
        peer = cls.connected(address)
        answer = peer.ask(shm.encode_hello(channel_token), Kind.WELCOME)
        peer.extent_bytes = shm.decode_welcome(answer.payload).extent_bytes
        return peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stream.close()

    def ask(self, request: bytes, *expected: Kind) -> Message:
        self.stream.send(request)
        return self.stream.receive(frozenset(expected))

    def refusal(self, request: bytes) -> Exception:
        """Returns the error with which the node refuses a request."""
        return shm.decode_refusal(self.ask(request, Kind.REFUSED).payload)

    def is_closed_by_the_node(self) -> bool:
        """Waits for the end of the stream."""
        try:
            while self.connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True

    def locate(self, namespace: bytes, *hashes: bytes) -> list[Place | PageStatus]:
        self.stream.send(shm.encode_locate(namespace, None, hashes))
        places: list[Place | PageStatus] = []
        while len(places) < len(hashes):
            answer = self.stream.receive(frozenset({Kind.LOCATED}))
            places += shm.decode_located(answer.payload, ExtentLayout(self.extent_bytes))
        return places

    def map(self, place: Place) -> mmap.mmap | None:
        """Returns the extent of a place as mapped by this process; None if it is gone or belongs to another tenant."""
        answer = self.ask(shm.encode_map(place.extent, place.tenancy), Kind.MAPPED, Kind.GONE)
        if answer.kind is Kind.GONE:
            return None
        assert answer.descriptor is not None
        assert fcntl.fcntl(answer.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        try:
            return mmap.mmap(answer.descriptor, ExtentLayout(self.extent_bytes).file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(answer.descriptor)


class LyingNode:
    """A shared memory socket that gives scripted answers to one client."""

    def __init__(self, answer: Callable[[ShmStream, Kind], None]) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.address = f"{self._directory.name}/shm"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address)
        self._listener.listen()
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> LyingNode:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()
        self._directory.cleanup()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        stream = ShmStream(connection)
        stream.bound(Deadline(MonotonicClock(), 10_000).left_ms)
        try:
            stream.receive({Kind.HELLO})
            stream.send(shm.encode_welcome(shm.Welcome(b"e" * 16, 1 << 20)))
            while True:
                self._answer(stream, stream.receive(shm.REQUESTS[State.OPEN]).kind)
        except Unavailable:
            stream.close()
