"""The choice of the transport for a call.

Owns: the transports that the node offers, best first, and which of them are suspended. Invariants: a transport that cannot be
opened (a blocked port, for example) is suspended for half a minute with a warning, and the call continues over the next one; a
transport that the user forced is never replaced; a call that may have had an effect is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from attnstore.client.base import BulkUnavailable, Transport
from attnstore.client.calls import Call
from attnstore.client.options import TransportName
from attnstore.clock import Clock
from attnstore.errors import InvalidArgument
from attnstore.logs import get_logger

T = TypeVar("T")

Verb = Callable[[Transport], Call[T] | None]
"""`verb(transport)` returns the call over this transport, or None if it cannot carry it."""

_SUSPENDED_MS = 30_000
_log = get_logger(__name__)


class TransportChoice:
    """The transports between one client and one node. Methods may be called from several threads at once."""

    def __init__(self, wanted: TransportName, clock: Clock) -> None:
        self._wanted = wanted
        self._clock = clock
        self._offered: tuple[Transport, ...] = ()
        self._suspended_until_ms: dict[str, float] = {}

    @property
    def is_known(self) -> bool:
        """True after `offer`."""
        return bool(self._offered)

    def offer(self, transports: Sequence[Transport]) -> None:
        """Records the node's offer, best first and gRPC last. Raises `InvalidArgument` if the forced transport is missing."""
        forced = [transport for transport in transports if transport.name == self._wanted]
        if self._wanted != "auto" and not forced:
            raise InvalidArgument(f"transport={self._wanted!r} is asked for and the node does not offer it")
        self._offered = (*forced, *(transport for transport in transports if transport.name != self._wanted))

    def wait(self, verb: Verb[T]) -> T:
        """Makes a call over the best transport that can carry it, and blocks the calling thread. Errors as in `Transport`."""
        for name, call in self._calls(verb):
            try:
                return call.wait()
            except BulkUnavailable as error:
                self._suspend(name, error)
        raise AssertionError("gRPC carries every call")

    async def run(self, verb: Verb[T]) -> T:
        """`wait`, for a task of the event loop."""
        for name, call in self._calls(verb):
            try:
                return await call
            except BulkUnavailable as error:
                self._suspend(name, error)
        raise AssertionError("gRPC carries every call")

    def _calls(self, verb: Verb[T]) -> Iterator[tuple[str, Call[T]]]:
        for transport in self._offered:
            if self._suspended_until_ms.get(transport.name, 0.0) <= self._clock.now_ms():
                call = verb(transport)
                if call is not None:
                    yield transport.name, call

    def _suspend(self, name: str, error: BulkUnavailable) -> None:
        if self._wanted == name:
            raise error
        self._suspended_until_ms[name] = self._clock.now_ms() + _SUSPENDED_MS
        _log.warning("transport unavailable, using the next one", transport=name, retry_after_ms=_SUSPENDED_MS, reason=str(error))
