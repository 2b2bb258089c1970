"""The round trip of a small message through a link, measured beside the memory traffic of a step.

A ping that is sent back to back finds its peers awake and their code in the cache; the layers of a step do not. So the formula uses
this round trip and not the link's nominal one.

Owns: `measured_rtt_ms`, and the process that answers (`python -m experiments.attend.ping`).
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
from contextlib import nullcontext
from time import perf_counter
from typing import Any, Final

import numpy as np

from attnstore.testing.link import Link

_MESSAGE_BYTES: Final = 128
_PINGS: Final = 200
_DEADLINE_S: Final = 10.0


def measured_rtt_ms(profile: str | None, traffic_bytes: int) -> float:
    """Returns the median round trip over a link (None: loopback, without a relay) while `traffic_bytes` are read between pings."""
    traffic: Any = np.ones(max(1, traffic_bytes // 8))
    answering = subprocess.Popen([sys.executable, "-m", "experiments.attend.ping"], stdout=subprocess.PIPE, text=True)
    try:
        assert answering.stdout is not None
        address = answering.stdout.readline().strip()
        with Link([address], profile) if profile is not None else nullcontext() as link:
            host, port = (link.addresses[0] if link is not None else address).rsplit(":", 1)
            with socket.create_connection((host, int(port)), _DEADLINE_S) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                times = []
                for _ in range(_PINGS):
                    traffic.sum()
                    began = perf_counter()
                    connection.sendall(bytes(_MESSAGE_BYTES))
                    _receive(connection)
                    times.append((perf_counter() - began) * 1e3)
        return statistics.median(times)
    finally:
        answering.kill()
        answering.communicate()


def _receive(connection: socket.socket) -> bool:
    """Returns whether a whole message came."""
    message = bytearray(_MESSAGE_BYTES)
    return connection.recv_into(message, flags=socket.MSG_WAITALL) == _MESSAGE_BYTES


def _answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_DEADLINE_S)
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while _receive(connection):
                connection.sendall(bytes(_MESSAGE_BYTES))


if __name__ == "__main__":
    _answer()
