"""The gRPC channel to one node: its calls and streams by the names of the service.

Owns: the channel. Invariant: every call ends within its deadline, and every failure leaves as one of our typed errors.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, ClassVar

import grpc

from attnstore.client.options import ConnectOptions
from attnstore.client.transports.tls_probe import explained
from attnstore.errors import ClientClosed, DeadlineExceeded, ProtocolError, Unavailable
from attnstore.limits import (
    CHALLENGE_BYTES,
    CONNECT_MS_MAX,
    DEADLINE_MS_DEFAULT,
    FRAME_BYTES_MAX,
    KEEPALIVE_MS,
    KEEPALIVE_TIMEOUT_MS,
    MESSAGE_BYTES_MAX,
)
from attnstore.wire import messages
from attnstore.wire.messages import CHALLENGE, METHODS, PROOF
from attnstore.wire.status import error_from_rpc

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", FRAME_BYTES_MAX),
    # Reconnects to a restarted node at once; gRPC's own back-off would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Despite its name, the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Without these settings a silent watch pings twice, then once a minute, and waits a minute for the answer.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The caller decides about retries: the error tree says what may be retried.
    ("grpc.enable_retries", 0),
)


def proxy_options(http_proxy: str | None) -> tuple[tuple[str, Any], ...]:
    """Returns a channel's options for an HTTP proxy, or for none, whatever the environment names."""
    return (("grpc.enable_http_proxy", 0),) if http_proxy is None else (("grpc.http_proxy", http_proxy),)


class RpcChannel:
    """Calls to one node over one HTTP/2 channel; belongs to the event loop that runs when it is created.

    Raises `ClientClosed` in a process that was forked while its parent had a channel open.
    """

    _open: ClassVar[weakref.WeakSet[RpcChannel]] = weakref.WeakSet()
    _is_stranded: ClassVar[bool] = False

    @classmethod
    def strand(cls) -> None:
        """Called in a forked child, where gRPC's threads do not exist, so that a call would wait forever."""
        cls._is_stranded = len(cls._open) > 0

    def __init__(self, options: ConnectOptions) -> None:
        if RpcChannel._is_stranded:
            raise ClientClosed(
                "this process was forked from one with an open client, which gRPC does not survive: start it with the spawn method"
            )
        target = options.target
        arguments = (*_CHANNEL_OPTIONS, *proxy_options(options.http_proxy))
        if target.tls:
            credentials = grpc.ssl_channel_credentials(options.tls_ca)
            self._channel = grpc.aio.secure_channel(str(target.address), credentials, options=arguments)
        else:
            self._channel = grpc.aio.insecure_channel(str(target.address), options=arguments)
        self.loop = asyncio.get_running_loop()
        self._check = options.check
        self._metadata = (("authorization", f"Bearer {options.token}"),) if options.token else ()
        self._stubs = {name: self._stub(method) for name, method in METHODS.items()}
        # Until the node has answered in the clear, it may require TLS: checked once.
        self._may_want_tls = target.address if not target.tls and options.http_proxy is None else None
        self._closed = False
        RpcChannel._open.add(self)

    async def close(self) -> None:
        """Closes the channel and every call on it; later calls raise `ClientClosed`."""
        self._closed = True
        RpcChannel._open.discard(self)
        await self._channel.close()

    async def call(self, name: str, request: Any, deadline_ms: float) -> Any:
        """Makes one unary call. Raises the typed error of its failure."""
        until_s = time.monotonic() + deadline_ms / 1000
        try:
            with _typed_errors():
                timeout_s = await self._admitted(deadline_ms)
                answer = await self._stubs[name](request, timeout=timeout_s, metadata=self._metadata)
        except Unavailable as error:
            address, self._may_want_tls = self._may_want_tls, None
            if address is None:
                raise
            raise await asyncio.to_thread(explained, error, address, until_s - time.monotonic()) from None
        self._may_want_tls = None
        return METHODS[name].decode_response(answer)

    async def read(self, request: Any, take: Callable[[bytes], None], deadline_ms: float) -> None:
        """Calls `take` with each encoded chunk of the requested pages, until the node has sent all."""
        timeout_s = await self._admitted(deadline_ms)
        call = self._stubs["Read"](request, timeout=timeout_s, metadata=self._metadata)
        try:
            with _typed_errors():
                while (message := await call.read()) is not grpc.aio.EOF:
                    take(message)
                    del message  # the next message then reuses its memory, which is still in the cache
        finally:
            call.cancel()

    async def write(self, chunks: Iterable[bytes], deadline_ms: float) -> Any:
        """Sends encoded chunks of pages. Returns the node's answer."""
        timeout_s = await self._admitted(deadline_ms)
        call = self._stubs["Write"](timeout=timeout_s, metadata=self._metadata)
        try:
            with _typed_errors():
                with suppress(asyncio.InvalidStateError):  # the node ended the call while pages were still being sent
                    for chunk in chunks:
                        await call.write(chunk)
                    await call.done_writing()
                answer = await call
        finally:
            call.cancel()
        return METHODS["Write"].decode_response(answer)

    async def watch(self, request: Any, deadline_ms: float | None) -> AsyncGenerator[Any, None]:
        """Yields events as messages; the first item is None, once the node has begun to watch."""
        admitted_s = await self._admitted(DEADLINE_MS_DEFAULT if deadline_ms is None else deadline_ms)
        call = self._stubs["Watch"](request, timeout=None if deadline_ms is None else admitted_s, metadata=self._metadata)
        try:
            with _typed_errors():
                if messages.WATCHING not in tuple(await call.initial_metadata()):
                    await call.read()  # raises the refusal
                    raise ProtocolError("the node sends events without having said from when on")
                yield None
                while (message := await call.read()) is not grpc.aio.EOF:
                    yield METHODS["Watch"].decode_response(message)
        finally:
            call.cancel()
        raise ProtocolError("the node ended a watch that only the caller or an error may end")

    async def attend(self, deadline_ms: float) -> AttendRpc:
        """Returns a new attend stream, accepted by the node; each exchange may take `deadline_ms`."""
        await self._admitted(deadline_ms)
        stream = AttendRpc(self._stubs["Attend"](metadata=self._metadata), deadline_ms)
        await stream.accepted()
        return stream

    async def _admitted(self, deadline_ms: float) -> float:
        """Returns how many seconds are left for a call to a node that has passed the check; the first call performs the check.

        Raises `Unavailable` if the server does not pass, and nothing was sent to it then; `ClientClosed` after `close`.
        """
        if self._closed:
            raise ClientClosed("the client is closed")
        check = self._check
        if check is None:
            return deadline_ms / 1000
        began_s, challenge = time.monotonic(), secrets.token_bytes(CHALLENGE_BYTES)
        with _typed_errors():
            metadata = ((CHALLENGE, challenge),)
            call = self._stubs["Describe"](messages.DescribeRequest(), timeout=deadline_ms / 1000, metadata=metadata)
            proof = dict(tuple(await call.initial_metadata())).get(PROOF, "")
            if not check.is_passed(challenge, str(proof)):
                call.cancel()
                raise Unavailable(f"what answers at {check.member.url} has not shown that it is node {check.member.node_id!r}")
            with suppress(grpc.RpcError):  # it may ask for a token, which is sent from now on
                await call
        self._check = None
        left_s = deadline_ms / 1000 - (time.monotonic() - began_s)
        if left_s <= 0:
            raise DeadlineExceeded("the node has shown who it is, and no time was left for the call")
        return left_s

    def _stub(self, method: messages.Method) -> Any:
        kind = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
        }[method.streams_requests, method.streams_responses]
        # Answers are decoded here, because gRPC's hook would turn invalid bytes into None.
        return kind(method.path, request_serializer=method.encode_request)


class AttendRpc:
    """The bidirectional call of one attend stream."""

    def __init__(self, call: Any, deadline_ms: float) -> None:
        self._call = call
        self._deadline_s = deadline_ms / 1000

    async def accepted(self) -> None:
        """Waits until the node has accepted the call. Raises the typed error of its refusal, or `DeadlineExceeded`."""
        with _typed_errors():
            async with self._in_time():
                if messages.ATTENDING not in tuple(await self._call.initial_metadata()):
                    await self._call.read()  # raises the refusal
                    raise ProtocolError("the node accepted an attend stream without saying so")

    async def write(self, message: Any) -> None:
        """Sends a request. Raises the typed error of the call's failure, or `DeadlineExceeded`."""
        with _typed_errors():
            async with self._in_time():
                try:
                    await self._call.write(message)
                except asyncio.InvalidStateError:  # the node has ended the call
                    await self._call.read()
                    raise ProtocolError("the node ended an attend stream without a reason") from None

    async def read(self) -> Any:
        """Returns the next response. Raises as `write` does."""
        with _typed_errors():
            async with self._in_time():
                message = await self._call.read()
        if message is grpc.aio.EOF:
            raise ProtocolError("the node ended an attend stream without a reason")
        return METHODS["Attend"].decode_response(message)

    def cancel(self) -> None:
        """Ends the call."""
        self._call.cancel()

    @asynccontextmanager
    async def _in_time(self) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(self._deadline_s):
                yield
        except TimeoutError:
            self._call.cancel()
            raise DeadlineExceeded("the node did not answer on the attend stream within the deadline") from None


os.register_at_fork(after_in_child=RpcChannel.strand)


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error.code(), error.details() or "", error.trailing_metadata() or ()) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Our task was not cancelled, so the channel was closed under the call.
        raise ClientClosed("the client was closed during the call") from None
