"""A TCP relay that gives loopback connections the rate, delay and faults of a profile.

Owns: `Relay`, its listeners, its connections and their threads, two or more per connection. Runs in a process of its own; use it
through `attnstore.testing.link`.

It imitates: serialization at the link's rate, shared by all connections in order of arrival; propagation delay and jitter in each
direction; the round trip of a TCP handshake; a link that stalls, flaps or is cut. It does not imitate TCP's slow start and losses
over a long path (both ends of the relay are loopback connections with large windows), nor headers. The kernel moves the bytes
(`splice`), through a pipe; they enter Python only while they are delayed.

Invariant: bytes of a connection leave in the order in which they arrived, unchanged, and none leaves earlier than the profile
allows, except for the first `_BURST_S` after a silence: a token bucket, like `tc tbf`.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnstore.address import Address
from attnstore.limits import KIB, MIB
from attnstore.links import LinkProfile

_BURST_S = 0.001
_PIPE_BYTES = 1 * MIB
_RECEIVE_BUFFER_BYTES = 512 * KIB
"""Enough for any rate on loopback; a deeper buffer would hold a slow link's bytes twice, here and in flight."""
_PIECE_BYTES_MIN = 1460
_PIECE_BYTES_DELAYED_MAX = 256 * KIB
_DELAYED_BYTES_MAX = 64 * MIB
"""Bytes in flight in one direction of one connection: 50 ms at 10 Gb/s."""
_DELAY_S_MIN = 50e-6
"""Shorter delays are not imitated: handing bytes to another thread takes longer, and the relay itself adds about as much."""
_CONNECTIONS_MAX = 256
_CONNECT_S_MAX = 5.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: closing sends RST


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic since the start. Payload bytes; `up` is from client to target."""

    connections: int
    up_bytes: int
    down_bytes: int


class Gate:
    """Whether the link moves any bytes. Initially open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed_until_s = 0.0
        self._flap_s = 0.0
        self._flaps_since_s = 0.0

    def open(self) -> None:
        """Lets all waiting traffic continue."""
        self._set(closed_until_s=0.0, flap_s=0.0)

    def close(self) -> None:
        """Stops all traffic until `open`."""
        self._set(closed_until_s=math.inf, flap_s=0.0)

    def flap(self, period_s: float) -> None:
        """Alternates between closed and open, one period each, until `open`."""
        self._set(closed_until_s=0.0, flap_s=period_s)

    def wait(self) -> None:
        """Returns when the link is open."""
        if self._closed_until_s == 0.0 and self._flap_s == 0.0:
            return
        with self._changed:
            while (left_s := self._closed_for_s(time.monotonic())) > 0:
                self._changed.wait(None if left_s == math.inf else left_s)

    def _set(self, *, closed_until_s: float, flap_s: float) -> None:
        with self._changed:
            self._closed_until_s, self._flap_s, self._flaps_since_s = closed_until_s, flap_s, time.monotonic()
            self._changed.notify_all()

    def _closed_for_s(self, now_s: float) -> float:
        if self._flap_s == 0.0:
            return self._closed_until_s - now_s
        phase_s = (now_s - self._flaps_since_s) % (2 * self._flap_s)
        return self._flap_s - phase_s


class Wire:
    """One direction of the cable, shared by all connections."""

    def __init__(self, bits_per_s: float, delay_s: float, jitter_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._free_s = now_s()
        self.moved_bytes = 0
        self.change(bits_per_s, delay_s, jitter_s)

    def change(self, bits_per_s: float, delay_s: float, jitter_s: float) -> None:
        """Changes the profile for bytes that arrive from now on; bytes in flight arrive as before."""
        with self._lock:
            self._s_per_byte = 8 / bits_per_s
            self.delay_s, self.jitter_s = delay_s, jitter_s
            self._free_s = min(self._free_s, self._now_s())
            # Pieces of about a millisecond, so that connections alternate on the wire and a change takes effect soon.
            whole = _PIECE_BYTES_DELAYED_MAX if delay_s >= _DELAY_S_MIN else _PIPE_BYTES
            self.piece_bytes = int(min(max(bits_per_s / 8 * 0.001, _PIECE_BYTES_MIN), whole))

    def admit(self, size_bytes: int) -> float:
        """Reserves the wire for `size_bytes` bytes. Returns the monotonic time, in seconds, at which the last of them has left."""
        now_s = self._now_s()
        with self._lock:
            self.moved_bytes += size_bytes
            self._free_s = max(self._free_s, now_s - _BURST_S) + size_bytes * self._s_per_byte
            return max(self._free_s, now_s)


class _DelayLine:
    """Bytes that have left one end and not yet reached the other; a thread delivers them."""

    def __init__(self, sink: socket.socket, gate: Gate) -> None:
        self._sink = sink
        self._gate = gate
        self._changed = threading.Condition()
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._due_s = 0.0
        self._broken = False
        self._thread = threading.Thread(target=self._deliver, daemon=True)

    @property
    def is_empty(self) -> bool:
        """True if everything that was put has been delivered."""
        return self._held_bytes == 0

    def put(self, due_s: float, piece: bytes) -> None:
        """Delivers at `due_s`, but not before earlier bytes. Waits while the line is full. Raises `OSError` if the
        sink is broken.
        """
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes < _DELAYED_BYTES_MAX or self._broken)
            if self._broken:
                raise BrokenPipeError
            self._due_s = max(self._due_s, due_s)
            self._pieces.append((self._due_s, piece))
            self._held_bytes += len(piece)
            self._changed.notify_all()

    def drain(self) -> None:
        """Returns when everything has been delivered, or the sink is broken."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_empty or self._broken)

    def close(self) -> None:
        """Accepts no more bytes; undelivered ones are dropped."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _deliver(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._pieces) or self._broken)
                    if self._broken:
                        return
                    due_s, piece = self._pieces.popleft()
                _sleep_until(due_s)
                self._gate.wait()
                self._sink.sendall(piece)
                with self._changed:
                    self._held_bytes -= len(piece)
                    self._changed.notify_all()
        except OSError:
            self.close()


class _Pump:
    """One direction of one connection: moves bytes from `source` to `sink` as the wire and the gate allow."""

    def __init__(self, source: socket.socket, sink: socket.socket, wire: Wire, gate: Gate, draw: random.Random) -> None:
        self._source = source
        self._sink = sink
        self._wire = wire
        self._gate = gate
        self._draw = draw

    def run(self) -> None:
        """Runs until the source ends, and then ends the sink. Raises `OSError` when either breaks."""
        line = _DelayLine(self._sink, self._gate)
        inlet, outlet = _pipe()
        try:
            while (size_bytes := os.splice(self._source.fileno(), inlet, self._wire.piece_bytes)) > 0:
                departure_s = self._wire.admit(size_bytes)
                delay_s = self._wire.delay_s
                _sleep_until(departure_s)
                if delay_s < _DELAY_S_MIN and line.is_empty:
                    self._gate.wait()
                    while size_bytes:
                        size_bytes -= os.splice(outlet, self._sink.fileno(), size_bytes)
                else:
                    due_s = departure_s + delay_s + self._wire.jitter_s * self._draw.uniform(-1, 1)
                    while size_bytes:
                        piece = os.read(outlet, size_bytes)
                        size_bytes -= len(piece)
                        line.put(due_s, piece)
            end_s = time.monotonic() + self._wire.delay_s
            line.drain()
            _sleep_until(end_s)
            self._sink.shutdown(socket.SHUT_WR)
        finally:
            line.close()
            os.close(inlet)
            os.close(outlet)


class _Connection:
    """A client's connection and ours to the target; closed when both directions have ended."""

    def __init__(self, client: socket.socket, target: socket.socket) -> None:
        self._sockets = (client, target)
        self._lock = threading.Lock()
        self._running = 2

    def run(self, pump: _Pump) -> None:
        """Runs one direction, on a thread of its own."""
        try:
            pump.run()
        except OSError:
            self.abort()
        with self._lock:
            self._running -= 1
            if self._running == 0:
                for end in self._sockets:
                    end.close()

    def abort(self) -> None:
        """Breaks the connection at both ends."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)

    @property
    def is_over(self) -> bool:
        return self._running == 0


class Relay:
    """Relays connections over one link: a connection to the first socket of a route goes to the route's address. `seed` determines
    all jitter.
    """

    def __init__(self, routes: Sequence[tuple[socket.socket, Address]], profile: LinkProfile, seed: int) -> None:
        self._gate = Gate()
        self._up = Wire(profile.up_bits_per_s, profile.one_way_ms / 1000, profile.jitter_ms / 1000)
        self._down = Wire(profile.down_bits_per_s, profile.one_way_ms / 1000, profile.jitter_ms / 1000)
        self._seed = seed
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._accepted = 0
        self._is_cut = False
        for listener, target in routes:
            # A connection inherits the buffer of its listener, and the handshake negotiates its window.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            threading.Thread(target=self._accept, args=(listener, target), daemon=True).start()

    def change(self, profile: LinkProfile) -> None:
        """Switches to another profile at any time."""
        self._up.change(profile.up_bits_per_s, profile.one_way_ms / 1000, profile.jitter_ms / 1000)
        self._down.change(profile.down_bits_per_s, profile.one_way_ms / 1000, profile.jitter_ms / 1000)

    def stall(self) -> None:
        """Stops all traffic without breaking connections, until `restore`."""
        self._gate.close()

    def flap(self, period_s: float) -> None:
        """Alternates between stalled and open, one period each, until `restore`."""
        self._gate.flap(period_s)

    def cut(self) -> None:
        """Breaks all connections, and new ones too, until `restore`."""
        with self._lock:
            self._is_cut = True
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.abort()
        self._gate.open()

    def restore(self) -> None:
        """Ends a stall, flapping or a cut."""
        with self._lock:
            self._is_cut = False
        self._gate.open()

    def traffic(self) -> Traffic:
        """Returns the traffic so far."""
        return Traffic(self._accepted, self._up.moved_bytes, self._down.moved_bytes)

    def _accept(self, listener: socket.socket, target: Address) -> None:
        while True:
            client, _ = listener.accept()
            with self._lock:
                self._accepted += 1
                number = self._accepted
                self._connections = [connection for connection in self._connections if not connection.is_over]
                refused = self._is_cut or len(self._connections) >= _CONNECTIONS_MAX
            if refused:
                _refuse(client)
            else:
                threading.Thread(target=self._connect, args=(client, target, number), daemon=True).start()

    def _connect(self, client: socket.socket, target: Address, number: int) -> None:
        try:
            server = target.connect(_CONNECT_S_MAX, receive_buffer_bytes=_RECEIVE_BUFFER_BYTES)
        except OSError:
            _refuse(client)
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        with self._lock:
            is_cut = self._is_cut
            self._connections.append(connection)
        if is_cut:
            connection.abort()
        # The handshake over the real path: the client believes that it is connected, and its first bytes wait.
        _sleep_until(time.monotonic() + 2 * self._up.delay_s)
        draws = [random.Random(f"{self._seed} {number} {direction}") for direction in ("up", "down")]
        up = _Pump(client, server, self._up, self._gate, draws[0])
        down = _Pump(server, client, self._down, self._gate, draws[1])
        threading.Thread(target=connection.run, args=(up,), daemon=True).start()
        connection.run(down)


def _refuse(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()


def _pipe() -> tuple[int, int]:
    """Returns write end and read end."""
    outlet, inlet = os.pipe()
    with contextlib.suppress(OSError):  # above the limit of an unprivileged user: a smaller pipe works too
        fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return inlet, outlet


def _sleep_until(monotonic_s: float) -> None:
    left_s = monotonic_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)
