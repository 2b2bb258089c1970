"""AttnStore through its public API: one client for each transport that the node offers, checksums on.

Writes use hashes that the node does not have. The written pages are deleted between passes, untimed; if wall-clock time counts (the
start's variant is `KEEPS`), the node evicts them instead. Reads in place (shm) hold a lease, and ask after use whether every page
was still there; they move no byte, so their GB/s means the bytes that became usable.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import count

import attnstore
from attnstore import copying
from attnstore.allocator import keep_freed_memory
from attnstore.limits import LEASE_MS_MAX
from attnstore.types import PageStatus
from experiments.bandwidth.lane import Move, Start, serve_lane
from experiments.bandwidth.pages import PageBuffers

LAYOUTS = {
    368_640: attnstore.PageLayout(layers=30, kv_heads=3, head_dim=64),  # SmolLM2-135M
    2 << 20: attnstore.PageLayout(layers=32, kv_heads=8, head_dim=128),  # Llama-3-8B
}
_DEADLINE_MS = 60_000.0
_RENEW_S = LEASE_MS_MAX / 1_000 / 2
_WARM_BYTES = 128 << 20
_COMPILING_S = 2.0
KEEPS = "keeps"


class StoreLane:
    """Clients of one node, in one process, which share source and destination."""

    def __init__(self, start: Start) -> None:
        self._url = start.address
        self._layout = LAYOUTS[start.page_bytes]
        self._namespace = attnstore.namespace(self._layout, model=b"bandwidth")
        self._hashes = [_hash(number) for number in range(start.pages)]
        # Several lanes may write to one node, so each has its own numbers.
        self._fresh: Iterator[bytes] = map(_hash, count(os.getpid() << 64))
        self._keeps = start.variant == KEEPS
        self._written: list[bytes] = []
        self._source = PageBuffers.filled(start.shape)
        self._destination = PageBuffers(start.shape)
        self._control = self._client("grpc")
        stored = self._control.write(self._namespace, self._hashes, self._source.views)
        if not all(verdict.is_kept for verdict in stored.verdicts):
            raise RuntimeError(f"the node does not hold the pages: {stored}")
        self._renew_at_s = time.monotonic() + _RENEW_S
        leased, self._lease = self._control.lease(self._namespace, self._hashes, LEASE_MS_MAX)
        if self._lease is None or leased != start.pages:
            raise RuntimeError(f"{leased} of {start.pages} pages could be leased")
        self._warm_up(start)
        self.verbs: dict[str, Move] = {}
        self.landing: dict[str, PageBuffers] = {}
        for transport in ("grpc", "tcp", "shm"):
            if transport == "grpc" or transport in self._control.describe().transports:
                self._add(transport)

    def _warm_up(self, start: Start) -> None:
        """Makes both sides compile the copy loop, which happens after enough copies, before anything is timed."""
        copying.prepare()
        if "shm" in self._control.describe().transports:
            hashes = [next(self._fresh) for _ in range(max(start.pages, _WARM_BYTES // start.page_bytes))]
            with self._client("shm") as writer:
                for begin in range(0, len(hashes), start.pages):
                    batch = hashes[begin : begin + start.pages]
                    writer.write(self._namespace, batch, self._source.views[: len(batch)])
                    self._control.delete(self._namespace, batch)
            time.sleep(_COMPILING_S)

    def begin_pass(self) -> None:
        """Deletes the written pages, so that the next pass finds room and none of them; renews the lease."""
        if self._written and not self._keeps:
            self._control.delete(self._namespace, self._written)
        self._written.clear()
        if time.monotonic() >= self._renew_at_s:
            assert self._lease is not None
            self._lease = self._control.renew(self._lease, LEASE_MS_MAX)
            self._renew_at_s = time.monotonic() + _RENEW_S

    def _add(self, transport: str) -> None:
        """Adds the verbs of one transport."""
        client = self._client(transport)

        def read(begin: int, end: int) -> None:
            answer = client.read(self._namespace, self._hashes[begin:end], self._destination.views[begin:end])
            if answer.leading_hits != end - begin:
                raise RuntimeError(f"{transport} read: {answer}")

        def write(begin: int, end: int) -> None:
            hashes = [next(self._fresh) for _ in range(begin, end)]
            self._written += hashes
            answer = client.write(self._namespace, hashes, self._source.views[begin:end])
            if set(answer.verdicts) != {PageStatus.STORED}:
                raise RuntimeError(f"{transport} write: {answer}")

        def read_in_place(begin: int, end: int) -> None:
            assert self._lease is not None
            with client.view(self._namespace, self._hashes[begin:end], lease=self._lease) as views:
                if set(views.verify()) != {PageStatus.OK}:
                    raise RuntimeError(f"in place: {views.verify()}")

        if transport == "shm":
            self.verbs |= {"shm_copy read": read, "shm_in_place read": read_in_place, "shm_copy write": write}
            self.landing["shm_copy read"] = self._destination
        else:
            self.verbs |= {f"{transport} read": read, f"{transport} write": write}
            self.landing[f"{transport} read"] = self._destination

    def _client(self, transport: str) -> attnstore.Client:
        client = attnstore.connect(self._url, transport=transport, deadline_ms=_DEADLINE_MS)
        assert isinstance(client, attnstore.Client), "one node"
        client.register_layout(self._namespace, self._layout)
        return client


def _hash(number: int) -> bytes:
    """Returns a block hash for the page of that number; the store treats hashes as opaque."""
    return number.to_bytes(32, "little")


if __name__ == "__main__":
    START = Start.from_arguments()
    keep_freed_memory()  # as our worker does at its start
    serve_lane(StoreLane(START), START)
