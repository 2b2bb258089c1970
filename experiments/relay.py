"""The accuracy of the relay: the rate that `attnstore.testing.link` reaches and the delay that it adds, for each profile.

    python -m experiments.relay [--profiles P ...] [--json PATH]

A server, the relay and a client, each a process, on loopback. For each profile: as many bytes as its link carries in two seconds
(at most 4 GB), from the server to the client over one connection, and the round trip of 64 bytes; `direct` is the same without the
relay. Medians over rounds.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

from attnstore.address import Address
from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from attnstore.testing.link import Link
from experiments.bandwidth.processes import Child, say_and_wait, serve_connections
from experiments.bandwidth.report import aligned
from experiments.options import COUNT

_DIRECT: Final = "direct"
_PROFILES: Final = (_DIRECT, "loopback", "10g", "1g", "100m", "10m", "1g@2ms", "10g@10ms", "wan-20ms", "inf@20ms", "5g")
_SECONDS: Final = 2.0
_BYTES_MAX: Final = 4_000_000_000
_PINGS: Final = 500
_PING_S: Final = 1.5
_BLOCK: Final = 1 << 20
_CONNECT_S_MAX: Final = 10.0
_ORDER: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Row:
    """One profile and its nominal figures; `asked_gbit_per_s` is None if it has no limit."""

    profile: str
    gbit_per_s: float
    asked_gbit_per_s: float | None
    rtt_ms: float
    asked_rtt_ms: float


def measure(profile: str, server: str, rounds: int) -> Row:
    """Measures transfers and round trips, `rounds` times."""
    with ExitStack() as stack:
        if profile == _DIRECT:
            address, bits_per_s, asked_rtt_ms = server, math.inf, 0.0
        else:
            link = stack.enter_context(Link([server], profile))
            address, bits_per_s, asked_rtt_ms = link.addresses[0], link.profile.down_bits_per_s, link.profile.rtt_ms
        size_bytes = int(min(_BYTES_MAX, bits_per_s / 8 * _SECONDS))
        speeds = [size_bytes * 8 / _pull_s(address, size_bytes) / 1e9 for _ in range(rounds)]
        round_trips = [_round_trip_s(address) for _ in range(rounds)]
    asked_gbit_per_s = bits_per_s / 1e9 if bits_per_s < math.inf else None
    return Row(profile, median(speeds), asked_gbit_per_s, median(round_trips) * 1000, asked_rtt_ms)


def _connected(address: str) -> socket.socket:
    connection = Address.parse(address).connect(_CONNECT_S_MAX)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _pull_s(address: str, size_bytes: int) -> float:
    """Returns the time from the first byte to the last; connecting and requesting belong to the round trip."""
    buffer = memoryview(bytearray(_BLOCK))
    with _connected(address) as connection:
        connection.sendall(_ORDER.pack(size_bytes + 1))
        connection.recv_into(buffer, 1)
        began = time.perf_counter()
        while size_bytes:
            size_bytes -= connection.recv_into(buffer, min(size_bytes, _BLOCK))
        return time.perf_counter() - began


def _round_trip_s(address: str) -> float:
    times: list[float] = []
    with _connected(address) as connection:
        connection.sendall(_ORDER.pack(0))
        connection.sendall(bytes(64))  # the first one includes connecting
        connection.recv(64, socket.MSG_WAITALL)
        until = time.perf_counter() + _PING_S
        while len(times) < _PINGS and time.perf_counter() < until:
            began = time.perf_counter()
            connection.sendall(bytes(64))
            connection.recv(64, socket.MSG_WAITALL)
            times.append(time.perf_counter() - began)
    return median(times)


def answer(connection: socket.socket) -> None:
    """The server: sends the requested number of bytes, or echoes what it receives."""
    block = memoryview(bytes(_BLOCK))
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        (left,) = _ORDER.unpack(connection.recv(_ORDER.size, socket.MSG_WAITALL))
        echoes = left == 0
        while left:
            left -= connection.send(block[: min(left, _BLOCK)])
        while echoes and (data := connection.recv(64)):
            connection.sendall(data)


def table(rows: Sequence[Row]) -> str:
    """Returns one line per profile."""
    lines = [("profile", "Gb/s", "asked", "round trip ms", "asked ms")]
    lines += [
        (
            row.profile,
            f"{row.gbit_per_s:.3g}",
            f"{row.asked_gbit_per_s:g}" if row.asked_gbit_per_s is not None else "-",
            f"{row.rtt_ms:.3f}",
            f"{row.asked_rtt_ms:g}",
        )
        for row in rows
    ]
    return aligned(lines, left=("profile",))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes. Always returns 0."""
    parser = CommandParser(prog="python -m experiments.relay", description="What the relay passes and what it adds.")
    parser.add_argument("--profiles", nargs="+", default=_PROFILES, metavar="P", help=f"links, or {_DIRECT}")
    parser.add_argument("--rounds", type=COUNT, default=3)
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows")
    parser.add_argument("--serve", action="store_true", help="be the other end (the experiment starts it itself)")
    options = parser.parse_args(argv)
    if options.serve:
        say_and_wait(serve_connections("127.0.0.1", answer))
        return 0
    with Child.of_module("experiments.relay", "--serve") as server:
        address = server.first_line().strip()
        rows = [measure(profile, address, options.rounds) for profile in options.profiles]
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
