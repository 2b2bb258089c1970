"""One step's queries to the nodes: sent before a layer's local attention is computed, and merged with it afterwards.

Owns: the memory of the queries and partials, which all layers share, so that a layer allocates nothing. On a device they pass
through `DeviceExchange`, and are merged there. Invariant: `merge` returns attention over all keys of every sequence, or raises
`PagesLost`; the step is void then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, empty, from_numpy

from attnstore.client.base import AttendStream
from attnstore.core.windows import first_keys
from attnstore.errors import AttnStoreError
from attnstore_worker.cache.attending.exchange import DeviceExchange
from attnstore_worker.cache.attending.fetched import FetchedLayers
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


Floats = Any
"""A numpy array of fp32."""


class _Piece:
    """Rows that are sent in one query: `rows` of the step's, for `sets` of `(set_id, rows)`."""

    def __init__(self, sets: list[tuple[int, int]], rows: list[int], firsts: list[int]) -> None:
        self.sets = tuple(sets)
        self.firsts = firsts
        self.rows = np.array(rows, dtype=np.int64)
        self.query: Floats = None
        self.out: Floats = None
        self.lse: Floats = None

    def data(self, query: Floats) -> memoryview:
        """Returns the bytes of the piece's rows of `query`. They are valid until the next call."""
        if len(self.rows) == len(query):  # a step has its rows in the order of its sequences
            return memoryview(query).cast("B")
        if self.query is None:
            self.query = np.empty((len(self.rows), *query.shape[1:]), dtype=np.float32)
        np.take(query, self.rows, axis=0, out=self.query, mode="clip")
        return memoryview(self.query).cast("B")


@dataclass(frozen=True, slots=True)
class SetRows:
    """Rows `[first_row, first_row + rows)` of a step ask about one set. `indices` are its pages' places in the sequence, `position`
    that of the first row.
    """

    set_id: int
    first_row: int
    rows: int
    indices: Sequence[int]
    position: int

    def first_keys(self, block_tokens: int, window: int) -> list[int]:
        """Returns the first key that each row sees through a sliding window, without the rows that see none: they are the last."""
        positions = range(self.position, self.position + self.rows)
        firsts = first_keys(self.indices, block_tokens, positions, window)
        return firsts[: bisect_left(firsts, len(self.indices) * block_tokens)]


class NodeRows:
    """The rows that one node is asked about, in pieces of at most `rows_max` rows; none if no row sees a page through `window`."""

    def __init__(
        self, stream: AttendStream, asked: Sequence[SetRows], rows_max: int, block_tokens: int, window: int | None = None
    ) -> None:
        self.stream = stream
        self.pieces: list[_Piece] = []
        named: list[tuple[int, int]] = []
        rows: list[int] = []
        firsts: list[int] = []
        for each in asked:
            seen = None if window is None else each.first_keys(block_tokens, window)
            count = each.rows if seen is None else len(seen)
            for begin in range(0, count, rows_max):
                part = min(rows_max, count - begin)
                if len(rows) + part > rows_max:
                    self.pieces.append(_Piece(named, rows, firsts))
                    named, rows, firsts = [], [], []
                named.append((each.set_id, part))
                rows += range(each.first_row + begin, each.first_row + begin + part)
                firsts += seen[begin : begin + part] if seen is not None else ()
        if rows:
            self.pieces.append(_Piece(named, rows, firsts))


class RemoteStep:
    """Call `ask` and then `merge`, for each layer; or `ask_rows` and `merge_rows`, if it `takes_arrays`. After a failure `lose` is
    called for each stream of the step, because answers may be in flight that will not be received. `exchange` is None if queries
    are in host memory. `fetched` are other blocks, which are attended to here.
    """

    def __init__(
        self,
        asked: Mapping[AttendStream, Sequence[SetRows]],
        rows_max: int,
        block_tokens: int,
        counts: AttendCounts,
        lose: Callable[[AttendStream, AttnStoreError], None],
        exchange: DeviceExchange | None = None,
        fetched: FetchedLayers | None = None,
    ) -> None:
        self._asked = asked
        self._sizes = rows_max, block_tokens
        self._by_window: dict[int | None, list[NodeRows]] = {}
        self._nodes: list[NodeRows] = []
        self._counts = counts
        self._lose_stream = lose
        self._exchange = exchange
        self._fetched = fetched
        self._layer = 0
        self._query: Floats = None
        self._own_query = empty(0)

    @property
    def takes_arrays(self) -> bool:
        """Whether `ask_rows` and `merge_rows` may be called: queries are in host memory, and the nodes answer all of them."""
        return self._exchange is None and self._fetched is None

    def ask(self, layer: int, query: Tensor, window: int | None = None) -> None:
        """Sends the rows of `query` `[total_q, q_heads, head_dim]` that see a page through the layer's sliding window, or all.
        Raises `PagesLost`.
        """
        self._own_query = query
        rows = query.float().contiguous() if self._exchange is None else self._exchange.fetch(query)
        self.ask_rows(layer, rows.numpy(), window)

    def ask_rows(self, layer: int, query: Floats, window: int | None = None) -> None:
        """`ask` of a contiguous array that stays as it is until the step has merged the layer."""
        self._layer, self._query = layer, query
        if window not in self._by_window:
            made = [NodeRows(stream, sets, *self._sizes, window) for stream, sets in self._asked.items()]
            self._by_window[window] = [node for node in made if node.pieces]
        self._nodes = self._by_window[window]
        self._send(0)

    def merge(self, out: Tensor, lse: Tensor) -> Tensor:
        """Returns `out` over all keys, from `out` fp32 and `lse` over the local keys. Overwrites both. Raises `PagesLost`."""
        if self._exchange is None:
            out = out.contiguous()
            self.merge_rows(out.numpy(), lse.numpy())
            if self._fetched is not None:
                self._fetched.merge(self._layer, self._own_query, out.numpy(), lse.numpy())
                self._counts.round_trips += self._fetched.windows
                self._counts.bytes_received += self._fetched.bytes_per_layer
            return out
        exchange = self._exchange

        def memory(piece: _Piece) -> tuple[Floats, Floats]:
            rows, heads, head_dim = len(piece.rows), out.shape[1], out.shape[2]
            return exchange.room("out", rows, heads, head_dim).numpy(), exchange.room("lse", rows, heads).numpy()

        def merge(piece: _Piece, part_out: Floats, part_lse: Floats) -> bool:
            if not (np.isfinite(part_out).all() and np.isfinite(part_lse).all()):
                return False
            exchange.merge(out, lse, (from_numpy(part_out), from_numpy(part_lse)), from_numpy(piece.rows))
            return True

        self._receive_all(memory, merge)
        return out

    def merge_rows(self, outs: Floats, lses: Floats) -> None:
        """Turns contiguous `outs` and `lses` over the local keys into those over all keys, in place. Raises `PagesLost`."""
        from attnstore.attention import online_softmax  # not at the top: a machine with a GPU may lack numba

        def memory(piece: _Piece) -> tuple[Floats, Floats]:
            if piece.out is None:
                piece.out = np.empty((len(piece.rows), *outs.shape[1:]), dtype=np.float32)
                piece.lse = np.empty((len(piece.rows), outs.shape[1]), dtype=np.float32)
            return piece.out, piece.lse

        def merge(piece: _Piece, part_out: Floats, part_lse: Floats) -> bool:
            return bool(online_softmax.merge_rows(outs, lses, piece.rows, part_out, part_lse))

        self._receive_all(memory, merge)

    def _send(self, number: int) -> None:
        for node in self._nodes:
            if number < len(node.pieces):
                piece = node.pieces[number]
                data = piece.data(self._query)
                try:
                    node.stream.ask(self._layer, piece.sets, data, piece.firsts)
                except AttnStoreError as error:
                    self._lose(node, error)
                self._counts.bytes_sent += len(data)
                self._counts.rows += len(piece.rows)

    def _receive_all(
        self, memory: Callable[[_Piece], tuple[Floats, Floats]], merge: Callable[[_Piece, Floats, Floats], bool]
    ) -> None:
        for number in range(max((len(node.pieces) for node in self._nodes), default=0)):
            if number:
                self._send(number)
            for node in self._nodes:
                if number < len(node.pieces):
                    piece = node.pieces[number]
                    partial = memory(piece)
                    self._receive(node, *partial)
                    if not merge(piece, *partial):
                        self._lose(node, PagesLost("a node's partial is not finite"))
            self._counts.round_trips += 1

    def _receive(self, node: NodeRows, out: Floats, lse: Floats) -> None:
        views = memoryview(out).cast("B"), memoryview(lse).cast("B")
        try:
            node.stream.receive(*views)
        except AttnStoreError as error:
            self._lose(node, error)
        self._counts.bytes_received += len(views[0]) + len(views[1])

    def _lose(self, node: NodeRows, error: AttnStoreError) -> None:
        if self._fetched is not None:
            self._fetched.close()
        self._lose_stream(node.stream, error)
        for stream in self._asked:
            if stream is not node.stream:
                self._lose_stream(stream, PagesLost("another node failed in the same step"))
        raise PagesLost(f"attention at a store node failed: {error}") from None
