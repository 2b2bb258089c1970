"""One step's queries to the nodes: sent before a layer's local attention is computed, and merged with it afterwards.

Owns: the memory of the partials, which all layers share. On a device they pass through `DeviceExchange`, and are merged there.
Invariant: `merge` returns attention over all keys of every sequence, or
raises `PagesLost`; the step is void then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnstore.attention import merge
from attnstore.client.base import AttendStream
from attnstore.errors import AttnStoreError
from attnstore_worker.cache.attending.exchange import DeviceExchange
from attnstore_worker.errors import PagesLost


@dataclass(slots=True)
class AttendCounts:
    """Counts since the start. `round_trips`: exchanges for which a step waited; nodes asked at once count as one. Bytes are
    payload, `losses` are streams that failed.
    """

    round_trips: int = 0
    rows: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    losses: int = 0


class NodeRows:
    """The rows that one node is asked about: `sets` of `(set_id, first row, rows)`, in pieces of at most `rows_max` rows."""

    def __init__(self, stream: AttendStream, sets: Sequence[tuple[int, int, int]], rows_max: int) -> None:
        self.stream = stream
        self.pieces: list[tuple[list[tuple[int, int]], Tensor]] = []
        named: list[tuple[int, int]] = []
        rows: list[int] = []
        for set_id, first, count in sets:
            for begin in range(first, first + count, rows_max):
                part = min(rows_max, first + count - begin)
                if len(rows) + part > rows_max:
                    self.pieces.append((named, torch.tensor(rows)))
                    named, rows = [], []
                named.append((set_id, part))
                rows += range(begin, begin + part)
        self.pieces.append((named, torch.tensor(rows)))


class RemoteStep:
    """Call `ask` and then `merge`, for each layer. After a failure `lose` is called for each stream of the step, because answers
    may be in flight that will not be received. `exchange` is None if queries are in host memory.
    """

    def __init__(
        self,
        nodes: Sequence[NodeRows],
        counts: AttendCounts,
        lose: Callable[[AttendStream, AttnStoreError], None],
        exchange: DeviceExchange | None = None,
    ) -> None:
        self._nodes = nodes
        self._counts = counts
        self._lose_stream = lose
        self._exchange = exchange
        self._rounds = max(len(node.pieces) for node in nodes)
        self._layer = 0
        self._query = torch.empty(0)
        self._partials: dict[int, tuple[Tensor, Tensor]] = {}

    def ask(self, layer: int, query: Tensor) -> None:
        """Sends the rows of `query` `[total_q, q_heads, head_dim]`. Raises `PagesLost`."""
        self._layer = layer
        self._query = query.float() if self._exchange is None else self._exchange.fetch(query)
        self._send(0)

    def merge(self, out: Tensor, lse: Tensor) -> Tensor:
        """Turns `out` fp32 and `lse` over the local keys into `out` over all keys, in place. Raises `PagesLost`."""
        for piece in range(self._rounds):
            if piece:
                self._send(piece)
            for node in self._nodes:
                if piece < len(node.pieces):
                    self._receive(node, piece, out, lse)
            self._counts.round_trips += 1
        return out

    def _send(self, piece: int) -> None:
        for node in self._nodes:
            if piece < len(node.pieces):
                sets, rows = node.pieces[piece]
                asked = self._query if len(rows) == len(self._query) else self._query[rows]
                data = _bytes(asked.contiguous())
                try:
                    node.stream.ask(self._layer, sets, data)
                except AttnStoreError as error:
                    self._lose(node, error)
                self._counts.bytes_sent += len(data)
                self._counts.rows += len(rows)

    def _receive(self, node: NodeRows, piece: int, out: Tensor, lse: Tensor) -> None:
        _, rows = node.pieces[piece]
        part_out, part_lse = self._memory(len(rows), out)
        views = _bytes(part_out), _bytes(part_lse)
        try:
            node.stream.receive(*views)
        except AttnStoreError as error:
            self._lose(node, error)
        self._counts.bytes_received += sum(map(len, views))
        if not bool(torch.isfinite(part_out).all() & torch.isfinite(part_lse).all()):
            self._lose(node, PagesLost("a node's partial is not finite"))
        if self._exchange is not None:
            self._exchange.merge(out, lse, (part_out, part_lse), rows)
            return
        merged = merge([out[rows], part_out], [lse[rows], part_lse])
        out[rows], lse[rows] = merged

    def _memory(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        _, heads, head_dim = like.shape
        if self._exchange is not None:
            return self._exchange.room("out", rows, heads, head_dim), self._exchange.room("lse", rows, heads)
        if rows not in self._partials:
            self._partials[rows] = torch.empty(rows, heads, head_dim), torch.empty(rows, heads)
        return self._partials[rows]

    def _lose(self, node: NodeRows, error: AttnStoreError) -> None:
        self._lose_stream(node.stream, error)
        for other in self._nodes:
            if other is not node:
                self._lose_stream(other.stream, PagesLost("another node failed in the same step"))
        raise PagesLost(f"attention at a store node failed: {error}") from None


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")
