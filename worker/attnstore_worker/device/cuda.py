"""A CUDA device by torch.

Owns: `CudaDevice`. Invariants: `compute` is the device's default stream, so work of torch that names no stream is ordered with the
steps, or the stream of an engine that runs the model itself; copies have a stream for each direction, which waits only for the
events that it is told of.

This package and the Triton kernels' launching code are the only ones that name `torch.cuda`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final
from weakref import WeakSet

import torch
from torch import Tensor

from attnstore.attention.triton import gather_pages, gather_runs, scatter_pages, scatter_runs
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError
from attnstore.limits import GIB, KIB
from attnstore.sizes import size_text
from attnstore_worker.device.base import Accesses, Copies, EngineCopies, Stream
from attnstore_worker.device.copies_direct import DirectCopies
from attnstore_worker.device.copies_ring import Load, RingCopies, RunCopies, ring_places
from attnstore_worker.device.copies_staged import StagedCopies
from attnstore_worker.device.cuda_streams import CudaEvent, CudaStream, CudaTimer, Faults
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.pages import PagePool
from attnstore_worker.device.pinned import Registrations
from attnstore_worker.dtypes import element_type
from attnstore_worker.errors import OutOfDeviceMemory

RING_BYTES_MAX: Final = GIB
"""The pages of 8,192 tokens of a model like Llama-3-8B, which vLLM computes in one step at most by default."""
DIRECT_PAGE_BYTES_MIN: Final = 512 * KIB
"""Pages of at least this size are copied one by one: their transfer takes several times as long as its start."""

_log = logging.getLogger(__name__)


class _CudaGraph:
    """See `Graph`."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


class CudaDevice:
    """See `Device`. Device `index` of those that CUDA shows this process; see `factory` for one that may not be there.

    `steps`: `CallersStream` for an engine that runs the model on a stream of its own.
    """

    addressable = False
    uses_triton = True
    accesses: Accesses | None = None

    def __init__(self, index: int, steps: type[CudaStream] = CudaStream) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.description = f"{properties.name}, {size_text(properties.total_memory)}"
        self._index = index
        self._faults = Faults(index)
        self._steps = steps(torch.cuda.default_stream(index), self._faults, sleeps=False)
        self.compute: Stream = self._steps
        # A thread that waits for a copy does so beside the thread that launches steps, and needs no core for it.
        self._up = CudaStream(torch.cuda.Stream(index), self._faults, sleeps=True)
        self._down = CudaStream(torch.cuda.Stream(index), self._faults, sleeps=True)
        self._registrations = Registrations(index)
        # The memory of graphs is shared only by captures on one stream.
        self._captures = torch.cuda.Stream(index)
        self._graphs: WeakSet[_CudaGraph] = WeakSet()
        self._graph_memory = torch.cuda.graph_pool_handle()

    def blocks(self, layout: PageLayout, capacity: int) -> Tensor:
        """See `Device.blocks`. Raises `OutOfDeviceMemory` and `DeviceLost`."""
        try:
            with self.submitting():
                blocks = torch.zeros(capacity, *layout.shape, dtype=element_type(layout.dtype), device=self.torch_device)
            # Copies are on other streams, which wait for nothing of this.
            self._steps.synchronize()
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(f"a pool of {size_text(capacity * layout.page_bytes)} is too large: {error}") from error
        return blocks

    def host_pages(self, layout: PageLayout, pool_bytes: int) -> PagePool:
        """See `Device.host_pages`. Memory that CUDA refuses to register is used as it is: its copies are right, and slow."""
        pages = PagePool(layout, pool_bytes)
        self.register(pages.tensor)
        return pages

    def register(self, host: Tensor) -> bool:
        """See `Device.register`. Raises `DeviceLost`."""
        with self._faults.mapped():
            return self._registrations.register(host)

    def unregister(self, host: Tensor) -> None:
        """See `Device.unregister`. Also on a lost device."""
        self._registrations.unregister(host)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Device.pinned`. Of torch's allocator: it is small, and lives as long as a tensor of it."""
        with self._faults.mapped():
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def transfer(self, source: Tensor, target: Tensor) -> CudaEvent:
        """See `Device.transfer`. Raises `DeviceLost`."""
        target.copy_(source, non_blocking=True)
        return self._steps.record()

    def copies(self, blocks: Tensor) -> Copies:
        """See `Device.copies`. Raises `OutOfDeviceMemory` and `DeviceLost`."""
        if blocks[0].numel() * blocks.element_size() >= DIRECT_PAGE_BYTES_MIN:
            return DirectCopies(blocks, self._up, self._down)
        return StagedCopies(blocks, self._up, self._down, scatter_pages, gather_pages)

    def engine_copies(self, blocks: EngineBlocks, layout: PageLayout, step_pages: int) -> EngineCopies:
        """See `Device.engine_copies`. Raises `OutOfDeviceMemory` and `DeviceLost`."""
        ring = self._ring(layout, ring_places(step_pages, layout.page_bytes, RING_BYTES_MAX))
        kernels = RunCopies(blocks, ring, self._steps, self._up, gather_runs, scatter_runs)
        load: Load = kernels.load
        if blocks.whole is not None and layout.page_bytes >= DIRECT_PAGE_BYTES_MIN:
            load = DirectCopies(blocks.whole.view(-1, *layout.shape), self._up, self._down).up
        return RingCopies(blocks, self.compute, DirectCopies(ring, self._up, self._down), len(ring), kernels.gather, load)

    def _ring(self, layout: PageLayout, places: int) -> Tensor:
        """Returns memory for a ring of at most `places` pages, as many as there is room for."""
        while True:
            try:
                return self.blocks(layout, places)
            except OutOfDeviceMemory as error:
                if places == 1:
                    raise
                places //= 2
                _log.warning("pages are saved through a ring of %d only: %s", places, error)

    def free_bytes(self) -> int:
        """See `Device.free_bytes`. Memory that torch keeps for the next step is not free. Raises `DeviceLost`."""
        with self._faults.mapped():
            free, _ = torch.cuda.mem_get_info(self._index)
            return free

    def timer(self) -> CudaTimer:
        """See `Device.timer`. Raises `DeviceLost`."""
        return self._steps.timer()

    def submitting(self) -> AbstractContextManager[None]:
        """See `Device.submitting`."""
        return self._steps.submitting()

    def capture(self, work: Callable[[], None]) -> _CudaGraph:
        """See `Device.capture`."""
        if not self._graphs:  # torch frees the memory of graphs with the last of them
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads copy pages meanwhile, which the mode `thread_local` permits.
        capturing = torch.cuda.graph(graph, pool=self._graph_memory, stream=self._captures, capture_error_mode="thread_local")
        short = False
        with self.submitting():
            try:
                with capturing:
                    try:
                        work()
                    except torch.OutOfMemoryError:
                        short = True
                        raise
            except RuntimeError as error:
                if short:  # the end of the capture may have raised another error instead
                    raise self._faults.out_of_memory() from error
                raise
        captured = _CudaGraph(graph)
        self._graphs.add(captured)
        return captured

    def close(self) -> None:
        """See `Device.close`."""
        for stream in (self._up, self._down, self._steps):
            try:
                stream.synchronize()
            except (AttnStoreError, RuntimeError) as error:
                _log.warning("%s is closed with work in flight: %s", self.name, error)
        self._registrations.close()
