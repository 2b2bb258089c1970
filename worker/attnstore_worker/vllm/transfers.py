"""The worker's half: pages into vLLM's blocks and out of them, beside the engine.

Owns: the loads that wait or run, the pages that wait to be written, and the measurements. Threads, reads in parts and the write
queue are those of `cache.moving`, copies those of the device; the store is a `RemoteTier`, whose methods never raise. Invariants: a
block is written only by the load that vLLM requested, and reported only after its last byte; a page that is not complete and
verified is reported as a failed block, and none of it is written; a step uses the blocks of a request that has ended only after the
last copy of its load; vLLM may reuse a saved block when `save` has returned; memory for pages is bounded, and a page beyond the
bound is not saved. A load's deadline begins with its request, before its turn: a page that has not arrived by then is a miss.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.errors import DeadlineExceeded
from attnstore.limits import MIB
from attnstore.logs import get_logger
from attnstore.types import PageStatus
from attnstore_worker.cache.moving.mover import Threads, read_in_parts
from attnstore_worker.cache.moving.write_queue import WriteQueue
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.base import After, Device, Event, Wait
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.pages import HostPages
from attnstore_worker.errors import DeviceLost, OutOfDeviceMemory
from attnstore_worker.vllm.plan import BlockPlan, RequestLoad

_LOADS_AT_ONCE: Final = 2
_PART_BYTES: Final = 16 * MIB
_MEASURED_LOADS_MAX: Final = 256

_log = get_logger(__name__)


class _Saved(NamedTuple):
    """A page that waits to be written: its slot, and the event after which it is there."""

    slot: int
    copied: Event


@dataclass(eq=False, slots=True)
class _Staging:
    """Memory of a load, in two halves: one part arrives in one half while the other is copied into blocks. `copied`: the last copy
    of each half.
    """

    pages: HostPages
    copied: list[Event | None] = field(default_factory=lambda: [None, None])


@dataclass(eq=False, slots=True)
class _Load:
    """A load that waits or runs. `after`: what its first copy waits for. `last`: its last copy. `ended`: its request has ended, and
    no copy is submitted any more. `lock` makes a copy and the end of the request exclude each other.
    """

    request: RequestLoad
    deadline: Deadline
    after: tuple[After, ...]
    last: Event | None = None
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Transfers:
    """Moves pages of `layout` between `tier` and vLLM's blocks on `device`. The tier's deadline bounds a load, a write and `flush`;
    `save_bytes_max` is the memory for pages that wait to be written; `step_pages` as in `Device.engine_copies`; a load is read in
    parts of `part_bytes`: while one is copied into vLLM's blocks, the next is read.

    `load`, `save` and `end` are called by the thread that runs vLLM's model.
    """

    def __init__(
        self,
        tier: RemoteTier,
        blocks: EngineBlocks,
        device: Device,
        layout: PageLayout,
        clock: Clock,
        *,
        save_bytes_max: int,
        step_pages: int,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        self._tier = tier
        self._device = device
        self._layout = layout
        self._clock = clock
        self._copies = device.engine_copies(blocks, layout, step_pages)
        self._loaders = Threads("load", _LOADS_AT_ONCE)
        self._readers = Threads("read", _LOADS_AT_ONCE)
        self._part_pages = max(1, part_bytes // layout.page_bytes)
        self._staging: deque[_Staging] = deque()  # of the loads that have ended: new memory must be zeroed first
        self._lock = threading.Lock()
        self._running: dict[str, _Load] = {}
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._loads: deque[Transfer] = deque(maxlen=_MEASURED_LOADS_MAX)
        save_bytes = max(save_bytes_max, layout.page_bytes)
        # Without a registration, memory that no page has used yet need not be there.
        self._saved = HostPages(layout, save_bytes) if device.addressable else device.host_pages(layout, save_bytes)
        self._free = list(range(self._saved.capacity - 1, -1, -1))
        self._writes: WriteQueue[_Saved] = WriteQueue(self._write, pages_max=self._saved.capacity)
        self._end: Deadline | None = None  # once `flush` has been called

    def load(self, load: RequestLoad) -> None:
        """Starts a load; `take_loaded` names it when it is over, within the deadline. Its blocks may be those of steps so far."""
        deadline = Deadline(self._clock, self._tier.deadline_ms)
        own = _Load(load, deadline, ((Wait.UP_AFTER_COMPUTE, self._device.compute.record()),))
        with self._lock:
            self._running[load.request_id] = own
        try:
            self._loaders.submit(partial(self._load, own))
        except RuntimeError:  # no thread is available
            _log.exception("a load could not be started", request=load.request_id)
            self._end_load(own, 0)

    def end(self, request_ids: Iterable[str]) -> None:
        """Ends the loads of requests that have ended, before a step that may use their blocks: no byte lands in them any more."""
        with self._lock:
            loads = [load for request_id in request_ids if (load := self._running.get(request_id)) is not None]
        for load in loads:
            with load.lock:
                load.ended = True
            if load.last is not None:
                self._device.compute.wait(load.last, Wait.STEP_AFTER_ENDED_UP)

    def save(self, blocks: Sequence[BlockPlan]) -> None:
        """Copies blocks that are complete after the steps so far, and hands them to the writer. vLLM may reuse them in the next
        step.
        """
        self._free += [page.slot for page in self._writes.take_finished()]
        kept, dropped = blocks[: len(self._free)], blocks[len(self._free) :]
        if dropped:
            _log.warning("the store takes pages more slowly than they are computed", dropped_pages=len(dropped))
        if not kept:
            return
        slots = [self._free.pop() for _ in kept]
        try:
            copied = self._copies.save([block.block_id for block in kept], self._saved.tensor, slots)
        except BaseException as error:
            self._free += slots
            if not isinstance(error, DeviceLost | OutOfDeviceMemory):
                raise
            _log.exception("pages were not copied; the store misses them", pages=len(slots))
            return
        for block, slot in zip(kept, slots, strict=True):
            self._writes.offer(BlockHash(block.page_hash), _Saved(slot, copied))  # the queue has room for every slot

    def take_loaded(self) -> set[str]:
        """Returns the requests whose loads have ended since the last call. Call `take_failed_blocks` after this, never before."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            return loaded

    def take_failed_blocks(self) -> set[int]:
        """Returns the blocks with useless content since the last call."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def take_loads(self) -> tuple[Transfer, ...]:
        """Returns the loads that found pages since the last call, each as one read from its turn to its last block."""
        with self._lock:
            loads = tuple(self._loads)
            self._loads.clear()
            return loads

    def flush(self) -> None:
        """Waits until no page waits to be written and no load runs, or the deadline is over; then ends."""
        end = self._end = Deadline(self._clock, self._tier.deadline_ms)
        with suppress(DeadlineExceeded):
            self._writes.flush(end.left_ms())
        self._writes.close()
        with suppress(DeadlineExceeded):
            self._loaders.wait_idle(end.left_ms())

    def _load(self, load: _Load) -> None:
        began_ms = self._clock.now_ms()
        good = 0
        try:
            if self._end is None:
                good = self._load_leading(load)
        except Exception:
            _log.exception("a load failed", request=load.request.request_id)
        if good:
            with self._lock:
                ended_ms, size_bytes = self._clock.now_ms(), good * self._layout.page_bytes
                asked = len(load.request.blocks)
                self._loads.append(
                    Transfer(Tier.REMOTE, TransferKind.READ, began_ms, ended_ms, asked, good, size_bytes, failed=False)
                )
        self._end_load(load, good)

    def _end_load(self, load: _Load, good: int) -> None:
        with self._lock:
            if not load.ended:  # otherwise the blocks are no longer the request's
                self._failed_blocks.update(block.block_id for block in load.request.blocks[good:])
            self._loaded.add(load.request.request_id)
            if self._running.get(load.request.request_id) is load:
                del self._running[load.request.request_id]

    def _load_leading(self, load: _Load) -> int:
        """Loads blocks up to the first whose page does not arrive. Returns how many; 0 for a request that has ended."""
        staging = self._staging.pop() if self._staging else self._new_staging()
        good = 0
        try:
            good = read_in_parts(
                self._readers,
                len(load.request.blocks),
                (self._half(staging, 0), self._half(staging, 1)),
                partial(self._read, load, staging),
                partial(self._copy, load, staging),
            )
        finally:
            if load.last is not None:
                load.last.wait(Wait.ARRIVED_AFTER_UP if good and not load.ended else Wait.RELEASED_AFTER_UP)
            self._staging.append(staging)
        return 0 if load.ended else good

    def _read(self, load: _Load, staging: _Staging, part: range, buffers: Sequence[memoryview]) -> int:
        """Reads a part into its half. Returns how many leading pages are complete and verified."""
        hashes = [BlockHash(load.request.blocks[index].page_hash) for index in part]
        try:
            left_ms = load.deadline.left_ms()
        except DeadlineExceeded:
            return 0
        if load.ended:
            return 0
        slots = self._slots(part)
        copied = staging.copied[self._half_of(part)]
        if copied is not None:
            copied.wait(Wait.STAGING_AFTER_UP)
        if self._device.accesses is not None:
            self._device.accesses.host(staging.pages.tensor, slots, writes=True)
        return self._tier.read(hashes, buffers[: len(part)], None, deadline_ms=left_ms).leading_hits

    def _copy(self, load: _Load, staging: _Staging, part: range, buffers: Sequence[memoryview]) -> None:
        """Submits the copies of a part into its blocks, unless the request has ended."""
        del buffers
        block_ids = [load.request.blocks[index].block_id for index in part]
        with load.lock:
            if block_ids and not load.ended:
                load.last = self._copies.load(staging.pages.tensor, self._slots(part), block_ids, after=load.after)
                load.after = ()  # later copies of the load follow the first one in order
                staging.copied[self._half_of(part)] = load.last

    def _new_staging(self) -> _Staging:
        return _Staging(self._device.host_pages(self._layout, 2 * self._part_pages * self._layout.page_bytes))

    def _half(self, staging: _Staging, half: int) -> list[memoryview]:
        return [staging.pages.page(half * self._part_pages + index) for index in range(self._part_pages)]

    def _half_of(self, part: range) -> int:
        return part.start // self._part_pages % 2

    def _slots(self, part: range) -> range:
        begin = self._half_of(part) * self._part_pages
        return range(begin, begin + len(part))

    def _write(self, hashes: Sequence[BlockHash], pages: Sequence[_Saved]) -> None:
        try:
            left_ms = self._tier.deadline_ms if self._end is None else self._end.left_ms()
            for copied in {id(page.copied): page.copied for page in pages}.values():
                copied.wait(Wait.WRITTEN_AFTER_DOWN)
        except DeadlineExceeded:
            return
        except DeviceLost:
            _log.exception("pages were not copied; the store misses them", pages=len(pages))
            return
        slots = [page.slot for page in pages]
        if self._device.accesses is not None:
            self._device.accesses.host(self._saved.tensor, slots, writes=False)
        verdicts = self._tier.write(hashes, [self._saved.page(slot) for slot in slots], deadline_ms=left_ms).verdicts
        unkept = {verdict for verdict in verdicts if not verdict.is_kept} - {PageStatus.ARRIVING}
        if unkept:
            _log.warning("pages were not saved", verdicts=sorted(verdict.name for verdict in unkept))
