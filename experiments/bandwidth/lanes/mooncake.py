"""Mooncake Store over its tcp transport: batch get and put between registered buffers, as its own integrations use it.

Runs under the interpreter of `--mooncake-python`, where `mooncake` is installed and AttnStore is not. The segment with the objects
belongs to a process of its own, so that every get and put crosses TCP. Puts use new keys; the written objects are removed between
passes, untimed.
"""

from __future__ import annotations

import ctypes
import socket
from itertools import count

from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

from experiments.bandwidth.lane import Start, serve_lane
from experiments.bandwidth.pages import PageBuffers, Shape
from experiments.bandwidth.processes import say_and_wait

_LOCAL_BUFFER_BYTES = 64 << 20


class MooncakeLane:
    """The client, which contributes no memory to the store."""

    def __init__(self, start: Start) -> None:
        self._page_bytes = start.page_bytes
        self._store = _joined(start.address, segment_bytes=0)
        self._source = PageBuffers.filled(start.shape)
        self._destination = PageBuffers(start.shape)
        self._source_at = self._registered(self._source, start.shape)
        self._destination_at = self._registered(self._destination, start.shape)
        self._fresh = map("w{}".format, count())
        self._written: list[str] = []
        self._keys = [f"r{index}" for index in range(start.pages)]
        self._put(self._keys, 0)
        self.verbs = {"mooncake_get read": self._read, "mooncake_put write": self._write}
        self.landing = {"mooncake_get read": self._destination}

    def begin_pass(self) -> None:
        """Removes the written objects."""
        for key in self._written:
            self._store.remove(key, True)
        self._written.clear()

    def _read(self, begin: int, end: int) -> None:
        at = [self._destination_at + index * self._page_bytes for index in range(begin, end)]
        got = self._store.batch_get_into(self._keys[begin:end], at, [self._page_bytes] * (end - begin))
        if set(got) != {self._page_bytes}:
            raise RuntimeError(f"get: {sorted(set(got))}")

    def _write(self, begin: int, end: int) -> None:
        keys = [next(self._fresh) for _ in range(begin, end)]
        self._written += keys
        self._put(keys, begin)

    def _put(self, keys: list[str], begin: int) -> None:
        at = [self._source_at + index * self._page_bytes for index in range(begin, begin + len(keys))]
        put = self._store.batch_put_from(keys, at, [self._page_bytes] * len(keys))
        if set(put) != {0}:
            raise RuntimeError(f"put: {sorted(set(put))}")

    def _registered(self, buffers: PageBuffers, shape: Shape) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffers.whole))
        if self._store.register_buffer(address, shape.total_bytes) != 0:
            raise RuntimeError("register_buffer failed")
        return address


def serve(start: Start) -> None:
    """Runs the process that holds the objects."""
    store = _joined(start.address, segment_bytes=3 * start.shape.total_bytes)
    say_and_wait("ready")
    store.close()


def _joined(master: str, segment_bytes: int) -> MooncakeDistributedStore:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        name = f"127.0.0.1:{probe.getsockname()[1]}"
    store = MooncakeDistributedStore()
    status = store.setup(name, "P2PHANDSHAKE", segment_bytes, _LOCAL_BUFFER_BYTES, "tcp", "", master)
    if status != 0:
        raise RuntimeError(f"Mooncake's setup failed with status {status}")
    return store


if __name__ == "__main__":
    START = Start.from_arguments()
    if START.variant == "server":
        serve(START)
    else:
        serve_lane(MooncakeLane(START), START)
