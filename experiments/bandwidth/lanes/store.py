"""AttnStore itself, through its public API: one client for each transport that the node offers, checksums on.

Writes go to hashes that the node does not have; the pages written are deleted between passes, outside the clock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import attnstore
from attnstore.types import PageStatus
from experiments.bandwidth.lane import Move, Start, serve_lane
from experiments.bandwidth.pages import PageBuffers

LAYOUTS = {
    368_640: attnstore.PageLayout(layers=30, kv_heads=3, head_dim=64),  # SmolLM2-135M
    2 << 20: attnstore.PageLayout(layers=32, kv_heads=8, head_dim=128),  # Llama-3-8B
}
_DEADLINE_MS = 60_000.0


class StoreLane:
    """Clients of one node, in one process, that share source and destination."""

    def __init__(self, start: Start) -> None:
        layout = LAYOUTS[start.page_bytes]
        self._namespace = attnstore.namespace(layout, model=b"bandwidth")
        self._hashes = [_hash(number) for number in range(start.pages)]
        # Several lanes may write to one node: each has numbers of its own.
        self._fresh: Iterator[bytes] = map(_hash, count(os.getpid() << 64))
        self._written: list[bytes] = []
        self._source = PageBuffers.filled(start.shape)
        self.destination = PageBuffers(start.shape)
        self._control = attnstore.connect(start.address, transport="grpc", deadline_ms=_DEADLINE_MS)
        self._control.register_layout(self._namespace, layout)
        stored = self._control.write(self._namespace, self._hashes, self._source.views)
        assert all(verdict.is_kept for verdict in stored.verdicts)
        self.verbs: dict[str, Move] = {}
        for transport in ["grpc", *sorted(set(self._control.describe().transports) - {"grpc"})]:
            self._add(start, layout, transport)

    def begin_pass(self) -> None:
        """Deletes what was written, so that the next pass finds room and no page of its own."""
        if self._written:
            self._control.delete(self._namespace, self._written)
            self._written.clear()

    def _add(self, start: Start, layout: attnstore.PageLayout, transport: str) -> None:
        client = attnstore.connect(start.address, transport=transport, deadline_ms=_DEADLINE_MS)
        client.register_layout(self._namespace, layout)

        def read(begin: int, end: int) -> None:
            answer = client.read(self._namespace, self._hashes[begin:end], self.destination.views[begin:end])
            if answer.leading_hits != end - begin:
                raise RuntimeError(f"{transport} read: {answer}")

        def write(begin: int, end: int) -> None:
            hashes = [next(self._fresh) for _ in range(begin, end)]
            self._written += hashes
            answer = client.write(self._namespace, hashes, self._source.views[begin:end])
            if set(answer.verdicts) != {PageStatus.STORED}:
                raise RuntimeError(f"{transport} write: {answer}")

        if transport == "shm":
            self.verbs["shm_copy read"] = read
        else:
            self.verbs[f"{transport} read"] = read
            self.verbs[f"{transport} write"] = write


def _hash(number: int) -> bytes:
    """A block hash for the page of that number; the store treats hashes as opaque."""
    return number.to_bytes(32, "little")


if __name__ == "__main__":
    START = Start.from_arguments()
    serve_lane(StoreLane(START), START)
