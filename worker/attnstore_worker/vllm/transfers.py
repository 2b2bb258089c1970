"""The worker's half: pages into vLLM's blocks and out of them, beside the engine.

Owns: the loads that wait or run, the pages that wait to be written, and the measurements. Threads, reads in parts and the write
queue are those of `cache.moving`, copies those of the device; the store is a `RemoteTier`, whose methods never raise. Invariants: a
block is written only by the load that vLLM requested, and reported only after its last byte; a page that is not complete and
verified, and what follows it, is reported as failed, and none of it is written; a step uses the blocks of a request that has ended
only after the last copy of its load; vLLM may reuse a saved block when `save` has returned; memory for pages is bounded, and a page
beyond the bound is not saved. A load's deadline begins with its request, before its turn: a page that has not arrived by then is a
miss.
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
from attnstore.errors import DeadlineExceeded
from attnstore.limits import MIB
from attnstore.logs import get_logger
from attnstore_worker.cache.moving.mover import Threads, read_in_parts
from attnstore_worker.cache.moving.write_queue import WriteQueue
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.base import After, Device, Event, Wait
from attnstore_worker.errors import DeviceLost, OutOfDeviceMemory
from attnstore_worker.vllm.group_pages import GroupLoads, GroupSaves, GroupStore, Staging
from attnstore_worker.vllm.plan import NO_BLOCK, Pages, RequestLoad

_LOADS_AT_ONCE: Final = 2
_PART_BYTES: Final = 16 * MIB
_MEASURED_LOADS_MAX: Final = 256

_log = get_logger(__name__)


class _Saved(NamedTuple):
    """A page that waits to be written: its group and slot, and the event after which it is there."""

    group: GroupSaves
    slot: int
    copied: Event


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
    """Moves pages between the store and vLLM's blocks on `device`. `sources`: where pages can be read, for each of vLLM's groups in
    order; the first are the rank's own, which it also writes, and of others one page of each of several shards may fill a block.
    The tiers' deadline bounds a load, a write and `flush`; `save_bytes_max` is the memory for pages that wait to be written; a load
    is read in parts of `part_bytes`: while one is copied into vLLM's blocks, the next is read. `whole`: vLLM can use a load only if
    all of it arrived.

    `load`, `save` and `end` are called by the thread that runs vLLM's model.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sequence[GroupStore]]],
        device: Device,
        clock: Clock,
        *,
        save_bytes_max: int,
        part_bytes: int = _PART_BYTES,
        whole: bool = False,
    ) -> None:
        groups = [parts[0] for parts in sources[0]]
        step_bytes = [own.step_pages * own.layout.page_bytes for own in groups]
        copies = [
            [
                [device.engine_copies(each.blocks, each.block_layout, each.step_pages * each.page_blocks) for each in parts]
                for parts in source
            ]
            for source in sources
        ]
        self._saves = [
            GroupSaves(own, device, own_copies[0], save_bytes=save_bytes_max * size // sum(step_bytes))
            for own, own_copies, size in zip(groups, copies[0], step_bytes, strict=True)
        ]
        self._sources = [
            [
                [GroupLoads(each, device, copy, part_bytes=part_bytes) for each, copy in zip(parts, of_parts, strict=True)]
                for parts, of_parts in zip(source, of_source, strict=True)
            ]
            for source, of_source in zip(sources, copies, strict=True)
        ]
        self._whole = whole or len(groups) > 1  # of several groups, vLLM cannot tell whose block has failed
        self._deadline_ms = groups[0].tier.deadline_ms
        self._device = device
        self._clock = clock
        self._loaders = Threads("load", _LOADS_AT_ONCE)
        self._readers = Threads("read", _LOADS_AT_ONCE)
        self._lock = threading.Lock()
        self._running: dict[str, _Load] = {}
        self._loaded: set[str] = set()
        self._failed_requests: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._loads: deque[Transfer] = deque(maxlen=_MEASURED_LOADS_MAX)
        self._writes: WriteQueue[_Saved] = WriteQueue(self._write, pages_max=sum(group.pages_max for group in self._saves))
        self._end: Deadline | None = None  # once `flush` has been called

    def load(self, load: RequestLoad) -> None:
        """Starts a load; `take_loaded` names it when it is over, within the deadline. Its blocks may be those of steps so far."""
        deadline = Deadline(self._clock, self._deadline_ms)
        own = _Load(load, deadline, ((Wait.UP_AFTER_COMPUTE, self._device.compute.record()),))
        with self._lock:
            self._running[load.request_id] = own
        try:
            self._loaders.submit(partial(self._load, own))
        except RuntimeError:  # no thread is available
            _log.exception("a load could not be started", request=load.request_id)
            self._end_load(own, [0 for _ in load.parts])

    def end(self, request_ids: Iterable[str]) -> None:
        """Ends the loads of requests that have ended, before a step that may use their blocks: no byte lands in them any more."""
        with self._lock:
            loads = [load for request_id in request_ids if (load := self._running.get(request_id)) is not None]
        for load in loads:
            with load.lock:
                load.ended = True
            if load.last is not None:
                self._device.compute.wait(load.last, Wait.STEP_AFTER_ENDED_UP)

    def save(self, saves: Iterable[Pages]) -> None:
        """Copies pages that are complete after the steps so far, and hands them to the writer. vLLM may reuse their blocks in the
        next step.
        """
        for page in self._writes.take_finished():
            page.group.free_slots([page.slot])
        dropped = sum(len(pages) - self._save(self._saves[pages.group], pages) for pages in saves)
        if dropped:
            _log.warning("the store takes pages more slowly than they are computed", dropped_pages=dropped)

    def take_loaded(self) -> set[str]:
        """Returns the requests whose loads have ended since the last call. Call the other two after this, never before."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            return loaded

    def take_failed_blocks(self) -> set[int]:
        """Returns the blocks with useless content since the last call, of loads that vLLM can use in part."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def take_failed_requests(self) -> set[str]:
        """Returns the requests whose loads have failed since the last call, of loads that vLLM can use whole only."""
        with self._lock:
            failed, self._failed_requests = self._failed_requests, set()
            return failed

    def take_loads(self) -> tuple[Transfer, ...]:
        """Returns the loads that found pages since the last call, each as one read from its turn to its last block."""
        with self._lock:
            loads = tuple(self._loads)
            self._loads.clear()
            return loads

    def flush(self) -> None:
        """Waits until no page waits to be written and no load runs, or the deadline is over; then ends."""
        end = self._end = Deadline(self._clock, self._deadline_ms)
        with suppress(DeadlineExceeded):
            self._writes.flush(end.left_ms())
        self._writes.close()
        with suppress(DeadlineExceeded):
            self._loaders.wait_idle(end.left_ms())

    def _save(self, group: GroupSaves, pages: Pages) -> int:
        """Returns how many pages there was room for."""
        slots = group.take_slots(len(pages))
        if not slots:
            return 0
        try:
            copied = group.save(pages.blocks_of(range(len(slots))), slots)
        except BaseException as error:
            group.free_slots(slots)
            if not isinstance(error, DeviceLost | OutOfDeviceMemory):
                raise
            _log.exception("pages were not copied; the store misses them", pages=len(slots))
            return len(slots)
        for name, slot in zip(pages.names, slots, strict=False):
            self._writes.offer(BlockHash(name), _Saved(group, slot, copied))  # the queue has room for every slot
        return len(slots)

    def _load(self, load: _Load) -> None:
        began_ms = self._clock.now_ms()
        good = [0 for _ in load.request.parts]
        size_bytes = 0
        source = self._sources[load.request.source]
        try:
            if self._end is None:
                for index, pages in enumerate(load.request.parts):
                    good[index] = len(pages)
                    for group in source[pages.group]:
                        arrived = self._load_leading(load, group, pages)
                        size_bytes += arrived * group.layout.page_bytes
                        good[index] = min(good[index], arrived)
                    if good[index] < len(pages):
                        break
        except Exception:
            good = [0 for _ in good]
            _log.exception("a load failed", request=load.request.request_id)
        if any(good):
            asked = sum(map(len, load.request.parts))
            ended_ms = self._clock.now_ms()
            with self._lock:
                self._loads.append(
                    Transfer(Tier.REMOTE, TransferKind.READ, began_ms, ended_ms, asked, sum(good), size_bytes, failed=False)
                )
        self._end_load(load, good)

    def _end_load(self, load: _Load, good: Sequence[int]) -> None:
        request = load.request
        with self._lock:
            if not load.ended:  # otherwise the blocks are no longer the request's
                for part, pages in zip(request.parts, good, strict=True):
                    if pages < len(part) and self._whole:
                        self._failed_requests.add(request.request_id)
                    elif pages < len(part):
                        self._failed_blocks.update(part.blocks_of(range(pages, len(part))))
                self._failed_blocks.discard(NO_BLOCK)
            self._loaded.add(request.request_id)
            if self._running.get(request.request_id) is load:
                del self._running[request.request_id]

    def _load_leading(self, load: _Load, group: GroupLoads, pages: Pages) -> int:
        """Loads pages up to the first that does not arrive. Returns how many; 0 for a request that has ended."""
        staging = group.take_staging()
        good = 0
        try:
            good = read_in_parts(
                self._readers,
                len(pages),
                (group.half(staging, 0), group.half(staging, 1)),
                partial(self._read, load, group, pages, staging),
                partial(self._copy, load, group, pages, staging),
            )
        finally:
            if load.last is not None:
                load.last.wait(Wait.ARRIVED_AFTER_UP if good and not load.ended else Wait.RELEASED_AFTER_UP)
            group.put_staging(staging)
        return 0 if load.ended else good

    def _read(
        self, load: _Load, group: GroupLoads, pages: Pages, staging: Staging, part: range, buffers: Sequence[memoryview]
    ) -> int:
        """Reads a part into its half. Returns how many leading pages are complete and verified."""
        names = [BlockHash(name) for name in pages.names[part.start : part.stop]]
        try:
            left_ms = load.deadline.left_ms()
        except DeadlineExceeded:
            return 0
        if load.ended:
            return 0
        copied = staging.copied[group.half_of(part)]
        if copied is not None:
            copied.wait(Wait.STAGING_AFTER_UP)
        group.arrives(staging, part)
        hits = group.tier.read(names, buffers[: len(part)], None, deadline_ms=left_ms).leading_hits
        if hits:
            group.arrived(staging, part[:hits])
        return hits

    def _copy(
        self, load: _Load, group: GroupLoads, pages: Pages, staging: Staging, part: range, buffers: Sequence[memoryview]
    ) -> None:
        """Submits the copies of a part into its blocks, unless the request has ended."""
        del buffers
        with load.lock:
            if part and not load.ended:
                copied = group.load(staging, part, pages.blocks_of(part), after=load.after)
                if copied is not None:
                    load.last, load.after = copied, ()  # later copies of the load follow the first one in order

    def _write(self, hashes: Sequence[BlockHash], pages: Sequence[_Saved]) -> None:
        try:
            left_ms = self._deadline_ms if self._end is None else self._end.left_ms()
            for copied in {id(page.copied): page.copied for page in pages}.values():
                copied.wait(Wait.WRITTEN_AFTER_DOWN)
        except DeadlineExceeded:
            return
        except DeviceLost:
            _log.exception("pages were not copied; the store misses them", pages=len(pages))
            return
        unkept = set()
        for group in dict.fromkeys(page.group for page in pages):
            own = [(name, page.slot) for name, page in zip(hashes, pages, strict=True) if page.group is group]
            unkept |= group.write([name for name, _ in own], [slot for _, slot in own], deadline_ms=left_ms)
        if unkept:
            _log.warning("pages were not saved", verdicts=sorted(verdict.name for verdict in unkept))
