"""Bounded waits of a blocking socket: checked before each system call that may wait for the peer.

Owns: the kernel's time-outs of one socket. Invariant: a wait overruns its bound by at most the previous, shorter bound. The kernel
measures the time, so that no call is split to look at a clock.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from attnstore.errors import DeadlineExceeded, Retryable, Unavailable
from attnstore.limits import PEER_BYTES_PER_S_MIN

T = TypeVar("T")

SENDING: Final = socket.SO_SNDTIMEO
RECEIVING: Final = socket.SO_RCVTIMEO
"""What a system call waits for: the peer takes bytes, or sends some."""

_TIMEVAL = struct.Struct("@ll")
_WAIT_MS_MAX = 86_400_000.0
_SLACK_MS = 20.0
"""The kernel's time-out is set again only when it is off by more than this; a wait ends at most this long after its bound."""

_SILENT = "the peer moved no byte of the bulk connection within the time-out"


class Window(NamedTuple):
    """How many bytes a peer has moved since a moment of `time.monotonic`."""

    began_s: float
    moved_bytes: int


class Waits:
    """The waits of one blocking socket, used by one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._left_ms: Callable[[], float] | None = None
        self._window_s = math.inf
        self._timeouts_ms = {RECEIVING: math.inf, SENDING: math.inf}

    def bound(self, left_ms: Callable[[], float]) -> None:
        """Bounds every later wait: `left_ms` is called before each system call and may raise to end the exchange."""
        self._left_ms = left_ms

    def demand(self, window_ms: float) -> None:
        """Makes a transfer fail when the peer moves less than `PEER_BYTES_PER_S_MIN` for about `window_ms`."""
        self._window_s = window_ms / 1000

    def judged(self, window: Window | None, moved_bytes: int) -> Window:
        """Counts the bytes that one wait of a transfer moved, and returns the window to pass next time.

        `window` is None after the first wait. Raises `DeadlineExceeded` for a peer that is too slow. Most transfers
        need one wait and do not call this.
        """
        now_s = time.monotonic()
        if window is None:
            return Window(now_s, 0)
        moved_bytes += window.moved_bytes
        elapsed_s = now_s - window.began_s
        if elapsed_s < self._window_s:
            return Window(window.began_s, moved_bytes)
        if moved_bytes < PEER_BYTES_PER_S_MIN * elapsed_s:
            raise DeadlineExceeded(f"the peer moved only {moved_bytes} bytes in {elapsed_s:.1f} s")
        return Window(now_s, 0)

    def left_ms(self) -> float:
        """Returns how long the next wait may be. Raises if the exchange must end."""
        assert self._left_ms is not None, "bound() comes before the first wait"
        return self._left_ms()

    def begin(self, purpose: int) -> None:
        """Before a system call that may wait, for `SENDING` or `RECEIVING`. Raises as `left_ms`."""
        left_ms = self.left_ms()
        if self._timeouts_ms[purpose] > left_ms + _SLACK_MS:
            self._set(purpose, left_ms)

    def resume(self, purpose: int) -> None:
        """After a system call whose wait timed out, before the same one again. Raises as `left_ms`, and where the time is up.

        The time-out may be a shorter one of an earlier wait: raising it only here spares most waits a system call.
        """
        left_ms = self.left_ms()
        if left_ms <= self._timeouts_ms[purpose] + _SLACK_MS:
            raise DeadlineExceeded(_SILENT)
        self._set(purpose, left_ms)

    def run(self, purpose: int, call: Callable[..., T], *arguments: object) -> T:
        """Makes a system call that may wait. Raises what the call, `begin` and `resume` raise."""
        self.begin(purpose)
        try:
            return call(*arguments)
        except BlockingIOError:
            self.resume(purpose)
        return call(*arguments)

    def _set(self, purpose: int, timeout_ms: float) -> None:
        whole_s, rest_us = divmod(max(1, int(min(timeout_ms, _WAIT_MS_MAX) * 1000)), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, purpose, _TIMEVAL.pack(whole_s, rest_us))
        self._timeouts_ms[purpose] = timeout_ms


def lost(error: OSError) -> Retryable:
    """Returns the typed error of a failed system call on a socket whose waits are bounded."""
    if isinstance(error, BlockingIOError):
        return DeadlineExceeded(_SILENT)
    return Unavailable(f"the bulk connection broke: {error.strerror or error}")
