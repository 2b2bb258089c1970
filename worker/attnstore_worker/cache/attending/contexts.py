"""Blocks that stay in the store: the leading pages of sequences, attended to by the nodes that hold them.

Owns: the worker's `StoreAttention` and the prefixes that sequences have open on it, with their statistics. The client owns the
places of pages, leases and the loss of nodes. Invariant: an error of the store loses prefixes and never anything else. Only the
engine's thread uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final

from attnstore.attention import create_attention
from attnstore.client.base import AttendStream
from attnstore.client.cluster.attend import AttendedPrefix as AttendedPrefix
from attnstore.client.cluster.attend import StoreAttention
from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError
from attnstore.limits import ATTEND_BYTES_MAX, ATTEND_ROWS_MAX
from attnstore.types import PageStatus
from attnstore_worker.cache.attending.exchange import DeviceExchange
from attnstore_worker.cache.attending.fetched import FetchedLayers, FetchedPart
from attnstore_worker.cache.attending.step import AttendCounts, RemoteStep, SetRows
from attnstore_worker.cache.planning.observation import Observer
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.base import AttendStore, LayerStore
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.base import Device
from attnstore_worker.errors import PagesLost

_LOG = logging.getLogger(__name__)

_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class QueryShape:
    """The queries of a model: heads, the factor on `q . k`, and whether some layers have a sliding window."""

    q_heads: int
    scale: float
    has_windows: bool = False

    def row_bytes(self, layout: PageLayout) -> int:
        """The bytes of one row over all layers: `q` and its answer `(out, lse)`, in fp32."""
        return _FLOAT_BYTES * layout.layers * self.q_heads * (2 * layout.head_dim + 1)

    def rows_max(self, layout: PageLayout) -> int:
        """The most rows of one query."""
        return min(ATTEND_ROWS_MAX, ATTEND_BYTES_MAX // (self.q_heads * layout.head_dim * _FLOAT_BYTES))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Since the start: `round_trips` as in `AttendStatistics`, and the payload of both directions."""

    round_trips: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class AttendStatistics:
    """A snapshot of `AttendCounts`, and the pages of the prefixes that are open now."""

    round_trips: int
    rows: int
    bytes_sent: int
    bytes_received: int
    losses: int
    pages_open: int


class RemoteAttention:
    """Attention over pages of `namespace` in `store`. A query ends within `deadline_ms`; `observer` is told of opened prefixes.
    Queries are on `device` (default: in host memory). `fetches(blocks, rows)` decides whether rows of one sequence have that many
    blocks fetched and attend to them here (None: never); it is not asked on a device.
    """

    def __init__(
        self,
        store: AttendStore,
        namespace: Namespace,
        layout: PageLayout,
        shape: QueryShape,
        *,
        deadline_ms: float,
        clock: Clock,
        observer: Observer,
        device: Device | None = None,
        fetches: Callable[[int, int], bool] | None = None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._layout = layout
        self._shape = shape
        self._deadline_ms = deadline_ms
        self._clock = clock
        self._observer = observer
        self._attention: StoreAttention | None = None
        self._open: dict[AttendedPrefix, Sequence[BlockHash]] = {}
        self._unfetchable: set[AttendedPrefix] = set()
        self._reading: ThreadPoolExecutor | None = None
        self._fetches = fetches
        self._rows_max = shape.rows_max(layout)
        self._counts = AttendCounts()
        self._exchange = DeviceExchange(device) if device is not None and not device.addressable else None

    def open(self, hashes: Sequence[BlockHash]) -> AttendedPrefix | None:
        """Opens the longest prefix that the store holds; returns None if there is none, or if the store fails."""
        try:
            prefix = self._begun().open(hashes)
        except AttnStoreError as error:
            _LOG.warning("the store does not attend: %s: %s", type(error).__name__, error)
            self._counts.losses += 1
            return None
        if prefix is not None:
            self._open[prefix] = hashes[: prefix.blocks]
            ended_ms = self._clock.now_ms()
            opened = Transfer(
                Tier.REMOTE,
                TransferKind.ATTEND,
                ended_ms - prefix.opened_ms,
                ended_ms,
                prefix.blocks,
                prefix.blocks,
                0,
                failed=False,
            )
            self._observer.transferred(opened)
        return prefix

    def close(self, prefix: AttendedPrefix) -> None:
        """Closes a prefix that a sequence does not need any more."""
        self._open.pop(prefix, None)
        self._unfetchable.discard(prefix)
        self._begun().close_prefix(prefix)

    def step(self, parts: Sequence[tuple[AttendedPrefix | None, int, int]]) -> RemoteStep | None:
        """Returns the queries of a step, from the prefix, the position of the first row and the number of rows of each sequence.
        None if no sequence has a prefix. Raises `PagesLost` if a prefix is already lost.
        """
        if any(prefix is not None and prefix.lost for prefix, _, _ in parts):
            raise PagesLost("blocks in the store were lost before this step")
        asked: dict[AttendStream, list[SetRows]] = {}
        fetched: list[tuple[AttendedPrefix, FetchedPart]] = []
        begin = 0
        for prefix, position, rows in parts:
            if prefix is not None and self._fetches_for(prefix, rows):
                fetched.append((prefix, FetchedPart(self._open[prefix], begin, rows)))
            else:
                for each in prefix.sets if prefix is not None else ():
                    asked.setdefault(each.stream, []).append(SetRows(each.set_id, begin, rows, each.indices, position))
            begin += rows
        if not asked and not fetched:
            return None
        sizes = self._rows_max, self._layout.block_tokens
        windows = self._fetched(fetched) if fetched else None
        return RemoteStep(asked, *sizes, self._counts, self._lose, self._exchange, windows)

    def traffic(self) -> Traffic:
        """The traffic so far."""
        return Traffic(self._counts.round_trips, self._counts.bytes_sent + self._counts.bytes_received)

    def statistics(self) -> AttendStatistics:
        """A snapshot."""
        return AttendStatistics(**asdict(self._counts), pages_open=sum(prefix.blocks for prefix in self._open))

    def end(self) -> None:
        """Closes every prefix."""
        self._open.clear()
        self._unfetchable.clear()
        if self._reading is not None:
            self._reading.shutdown(wait=False, cancel_futures=True)
        if self._attention is not None:
            self._attention.close()

    def _fetches_for(self, prefix: AttendedPrefix, rows: int) -> bool:
        if self._fetches is None or self._exchange is not None or not isinstance(self._store, LayerStore):
            return False
        return prefix not in self._unfetchable and self._fetches(prefix.blocks, rows)

    def _fetched(self, parts: Sequence[tuple[AttendedPrefix, FetchedPart]]) -> FetchedLayers:
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "attnstore-attended-layers")
        prefixes = {part: prefix for prefix, part in parts}

        def lose(part: FetchedPart) -> None:
            self._unfetchable.add(prefixes[part])  # the step is computed again, and attends
            self._counts.losses += 1

        of_parts = [part for _, part in parts]
        return FetchedLayers(
            of_parts, self._layout, self._shape.scale, create_attention("cpu"), self._read_layer, self._reading, lose
        )

    def _read_layer(self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview], layer: int) -> bool:
        assert isinstance(self._store, LayerStore)
        read = self._store.read(self._namespace, hashes, buffers, layers=(layer, layer + 1), deadline_ms=self._deadline_ms)
        return all(status is PageStatus.OK for status in read.statuses)

    def _lose(self, stream: AttendStream, error: AttnStoreError) -> None:
        """Loses every prefix with a set on a stream that failed in a step."""
        _LOG.warning("attention at a store node failed: %s: %s", type(error).__name__, error)
        self._counts.losses += 1
        stream.close()

    def _begun(self) -> StoreAttention:
        """Returns the store's attention; the first call registers the namespace."""
        if self._attention is None:
            self._store.register_layout(self._namespace, self._layout)
            self._attention = self._store.attention(
                self._namespace, q_heads=self._shape.q_heads, scale=self._shape.scale, deadline_ms=self._deadline_ms
            )
        return self._attention
