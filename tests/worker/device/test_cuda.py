"""Every method of the contract on a CUDA device. Skipped where there is none: nothing of CUDA is replaced by something else."""

from __future__ import annotations

import gc
import mmap
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnstore.core.layout import DType, PageLayout
from attnstore.memory_files import create, map_read_only
from attnstore_worker.device.base import Copies, Device, Graph, Wait
from attnstore_worker.device.cuda import DIRECT_PAGE_BYTES_MIN, CudaDevice
from attnstore_worker.device.pages import anonymous_memory
from attnstore_worker.errors import OutOfDeviceMemory

pytestmark = pytest.mark.gpu

SMALL = PageLayout(layers=3, kv_heads=2, head_dim=32, block_tokens=16, dtype=DType.BF16)
LARGE = PageLayout(layers=4, kv_heads=8, head_dim=128, block_tokens=64, dtype=DType.BF16)
LAYOUTS = pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["staged", "direct"])
BLOCKS, SLOTS = 40, 48


@pytest.fixture
def device() -> Iterator[Device]:
    device = CudaDevice(0)
    yield device
    device.close()
    gc.collect()


def filled(device: Device, layout: PageLayout) -> Tensor:
    """Registered host memory with random bytes, among them those of numbers that are not finite."""
    pages = device.host_pages(layout, SLOTS * layout.page_bytes).tensor
    pages.view(torch.int16).random_(-(2**15), 2**15)
    return pages


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_the_layouts_are_copied_in_different_ways() -> None:
    assert SMALL.page_bytes < DIRECT_PAGE_BYTES_MIN <= LARGE.page_bytes


def test_a_device_says_what_it_is(device: Device) -> None:
    assert (device.name, device.torch_device) == ("cuda:0", torch.device("cuda", 0))
    assert device.description.startswith(torch.cuda.get_device_name(0))
    assert not device.addressable


@LAYOUTS
def test_blocks_are_zeros_on_the_device(device: Device, layout: PageLayout) -> None:
    blocks = device.blocks(layout, BLOCKS)
    assert blocks.shape == (BLOCKS, *layout.shape)
    assert blocks.device == device.torch_device
    assert not blocks.cpu().any()


@LAYOUTS
def test_pages_keep_their_bytes_up_and_down(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    slots = [*range(20, 40), 3, 1, 7]
    block_ids = [*range(5, 25), 0, 39, 30]
    copies.up(host, slots, block_ids).wait(Wait.ARRIVED_AFTER_UP)
    for slot, block_id in zip(slots, block_ids, strict=True):
        assert same(blocks[block_id].cpu(), host[slot])
    untouched = [block_id for block_id in range(BLOCKS) if block_id not in block_ids]
    assert not blocks[untouched].cpu().any()
    back = device.host_pages(layout, SLOTS * layout.page_bytes).tensor
    copies.down(block_ids, back, slots).wait(Wait.WRITTEN_AFTER_DOWN)
    assert same(back[slots], host[slots])
    assert not back[[slot for slot in range(SLOTS) if slot not in slots]].any()


@LAYOUTS
def test_only_the_named_layers_arrive(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    device.copies(blocks).up(host, [4, 5, 9], [0, 1, 8], layers=range(1, 3)).wait(Wait.ARRIVED_AFTER_UP)
    for slot, block_id in ((4, 0), (5, 1), (9, 8)):
        assert same(blocks[block_id, 1:3].cpu(), host[slot, 1:3])
        assert not blocks[block_id, 0].cpu().any()


@LAYOUTS
def test_a_batch_is_larger_than_the_buffer(device: Device, layout: PageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.device.copies_staged.STAGED_BYTES", 3 * layout.page_bytes)
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    ids = list(range(BLOCKS))
    copies.up(host, ids[::-1], ids).wait(Wait.ARRIVED_AFTER_UP)
    assert same(blocks.cpu(), host[:BLOCKS].flip(0))


@LAYOUTS
@pytest.mark.parametrize(("slots", "block_ids"), [([SLOTS], [0]), ([-1], [0]), ([0], [BLOCKS]), ([0], [-1]), ([0, 1], [0])])
def test_an_index_out_of_range_copies_nothing(device: Device, layout: PageLayout, slots: list[int], block_ids: list[int]) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    before = host.clone()
    with pytest.raises(IndexError):
        copies.up(host, slots, block_ids)
    with pytest.raises(IndexError):
        copies.down(block_ids, host, slots)
    assert not blocks.cpu().any()
    assert same(host, before)


@LAYOUTS
def test_a_copy_begins_after_the_step_that_it_waits_for(device: Device, layout: PageLayout) -> None:
    blocks = device.blocks(layout, BLOCKS)
    host = device.host_pages(layout, SLOTS * layout.page_bytes).tensor
    copies = device.copies(blocks)
    with device.submitting():
        _busy(device)
        blocks.fill_(2.0)
    computed = device.compute.record()
    event = copies.down([1, 2], host, [0, 1], after=[(Wait.DOWN_AFTER_COMPUTE, computed)])
    assert not event.done(), "the step takes long, and the copy comes after it"
    event.wait(Wait.WRITTEN_AFTER_DOWN)
    assert event.done()
    assert torch.all(host[:2] == 2)


@LAYOUTS
def test_a_copy_takes_its_own_time_and_not_that_of_the_step_that_it_waits_for(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    copies.up(host, [0], [0]).wait(Wait.ARRIVED_AFTER_UP)  # compiles its kernel
    timer = device.timer()
    with device.submitting():
        _busy(device)
    timer.stop()
    copy = copies.up(host, [0], [0], after=[(Wait.UP_AFTER_COMPUTE, device.compute.record())])
    assert copy.elapsed_ms() is None
    copy.wait(Wait.ARRIVED_AFTER_UP)
    copy_ms, step_ms = copy.elapsed_ms(), timer.elapsed_ms()
    assert copy_ms is not None
    assert step_ms is not None
    assert 0 < copy_ms < step_ms / 2


@LAYOUTS
def test_a_step_begins_after_the_copy_that_it_waits_for(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    arrived = copies.up(host, list(range(BLOCKS)), list(range(BLOCKS)))
    device.compute.wait(arrived, Wait.COMPUTE_AFTER_UP)
    with device.submitting():
        read = blocks.clone()
    assert same(read.cpu(), host[:BLOCKS])


@LAYOUTS
def test_threads_that_never_named_a_device_copy_at_the_same_time(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    failed: list[BaseException] = []

    def copy(own: list[int]) -> None:
        try:
            for _ in range(5):
                copies.up(host, own, own).wait(Wait.ARRIVED_AFTER_UP)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=copy, args=(list(range(begin, BLOCKS, 4)),)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert same(blocks.cpu(), host[:BLOCKS])


def test_too_large_a_pool_is_refused_with_both_figures_and_the_device_still_works(device: Device) -> None:
    free = device.free_bytes()
    assert free is not None
    with pytest.raises(OutOfDeviceMemory, match=r"a pool of \S+ is too large: cuda:0 has too little memory: \S+ of \S+ are free"):
        device.blocks(LARGE, 2 * free // LARGE.page_bytes)
    assert not device.blocks(LARGE, 1).cpu().any()


def test_a_step_that_does_not_fit_is_out_of_memory(device: Device) -> None:
    free = device.free_bytes()
    assert free is not None
    with pytest.raises(OutOfDeviceMemory), device.submitting():
        torch.empty(2 * free, dtype=torch.uint8, device=device.torch_device)


def test_an_error_of_the_calling_code_is_not_one_of_the_device(device: Device) -> None:
    with pytest.raises(RuntimeError, match="size"), device.submitting():
        torch.ones(2, device=device.torch_device) + torch.ones(3, device=device.torch_device)
    assert not device.blocks(SMALL, 1).cpu().any()


def test_a_pool_is_less_free_memory(device: Device) -> None:
    before = device.free_bytes()
    blocks = device.blocks(LARGE, 64)
    after = device.free_bytes()
    assert before is not None
    assert after is not None
    assert before - after >= blocks.numel() * blocks.element_size()


def test_a_timer_measures_the_work_and_never_waits_for_it(device: Device) -> None:
    with device.submitting():
        timer = device.timer()
        assert timer.elapsed_ms() is None
        _busy(device)
        timer.stop()
    assert timer.elapsed_ms() is None, "the work takes long"
    device.compute.record().wait(Wait.TOKENS_AFTER_COMPUTE)
    elapsed = timer.elapsed_ms()
    assert elapsed is not None
    assert elapsed > 0


def test_captured_work_is_done_again_on_the_same_tensors(device: Device) -> None:
    with device.submitting():
        source = torch.zeros(1000, device=device.torch_device)
        target = torch.zeros(1000, device=device.torch_device)

    def work() -> None:
        target.copy_(source * 2 + 1)

    with device.submitting():
        work()
    graph = device.capture(work)
    for value in (3.0, 5.0):
        with device.submitting():
            source.fill_(value)
            graph.replay()
        assert torch.all(target.cpu() == 2 * value + 1)


def test_graphs_share_memory_and_new_ones_are_captured_after_the_last_is_gone(device: Device) -> None:
    source = torch.ones(1 << 20, device=device.torch_device)
    results: dict[int, Tensor] = {}

    def capture(number: int) -> Graph:
        def work() -> None:
            results[number] = source * number + 1

        with device.submitting():
            work()
        results.clear()
        return device.capture(work)

    for _ in range(2):
        graphs = [capture(number) for number in (2, 3)]
        for graph, number in zip(graphs, (2, 3), strict=True):
            with device.submitting():
                graph.replay()
            if number in results:
                assert torch.all(results[number].cpu() == number + 1)
        results.clear()
        del graph, graphs
        gc.collect()


def test_a_capture_that_does_not_fit_is_out_of_memory_and_the_next_one_works(device: Device) -> None:
    free = device.free_bytes()
    assert free is not None
    source = torch.ones(1000, device=device.torch_device)

    def work(size: int) -> None:
        source.add_(1)
        torch.empty(size, dtype=torch.uint8, device=device.torch_device)

    with pytest.raises(OutOfDeviceMemory):
        device.capture(lambda: work(2 * free))
    graph = device.capture(lambda: work(10))
    with device.submitting():
        graph.replay()
    assert torch.all(source.cpu() == 2)


@LAYOUTS
def test_pages_are_copied_while_another_thread_captures(device: Device, layout: PageLayout) -> None:
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    copies.up(host, [0], [0]).wait(Wait.ARRIVED_AFTER_UP)  # compiles the kernel
    source = torch.zeros(1000, device=device.torch_device)
    failed: list[BaseException] = []

    def copy() -> None:
        try:
            copies.up(host, list(range(BLOCKS)), list(range(BLOCKS))).wait(Wait.ARRIVED_AFTER_UP)
        except BaseException as error:
            failed.append(error)

    def work() -> None:
        source.add_(1)
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
        source.add_(1)

    graph = device.capture(work)
    assert failed == []
    with device.submitting():
        graph.replay()
    assert torch.all(source.cpu() == 2)
    assert same(blocks.cpu(), host[:BLOCKS])


def test_memory_is_registered_once_and_can_be_registered_again_after_its_end(device: Device) -> None:
    memory = torch.frombuffer(anonymous_memory(16 * mmap.PAGESIZE), dtype=torch.uint8)
    memory.zero_()
    assert device.register(memory)
    assert memory.is_pinned()
    assert device.register(memory), "a second use of the same registration"
    assert device.register(memory[mmap.PAGESIZE : 2 * mmap.PAGESIZE])
    device.unregister(memory)
    device.unregister(memory)
    assert memory.is_pinned(), "the part is still in use"
    device.unregister(memory[mmap.PAGESIZE : 2 * mmap.PAGESIZE])
    assert not memory.is_pinned()
    device.unregister(memory)
    assert device.register(memory)


def test_memory_that_overlaps_a_registration_is_refused_and_the_device_still_works(device: Device) -> None:
    memory = torch.frombuffer(anonymous_memory(16 * mmap.PAGESIZE), dtype=torch.uint8)
    memory.zero_()
    assert device.register(memory[: 8 * mmap.PAGESIZE])
    assert not device.register(memory[4 * mmap.PAGESIZE :])
    assert not device.blocks(SMALL, 1).cpu().any()


def test_memory_that_cuda_does_not_register_is_refused_and_the_next_kernel_does_not_fail(device: Device) -> None:
    memory = torch.frombuffer(anonymous_memory(16 * mmap.PAGESIZE), dtype=torch.uint8)
    memory.zero_()
    assert device.register(memory)
    second = CudaDevice(0)  # does not know of the first one's registration, but CUDA does
    assert not second.register(memory)
    assert not second.blocks(SMALL, 1).cpu().any()
    second.close()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_pages_of_a_file_that_is_mapped_read_only_are_copied_up(device: Device) -> None:
    size = -(-4 * SMALL.page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    file, writable = create("pages", size)
    torch.frombuffer(writable, dtype=torch.int16).random_(-(2**15), 2**15)
    flat = torch.frombuffer(map_read_only(file, 0, size), dtype=torch.bfloat16)
    host = flat[: 4 * SMALL.page_bytes // 2].view(4, *SMALL.shape)
    device.register(host)  # a driver without read-only registrations refuses: the copies are right in both cases
    blocks = device.blocks(SMALL, 4)
    device.copies(blocks).up(host, [3, 2, 1, 0], [0, 1, 2, 3]).wait(Wait.ARRIVED_AFTER_UP)
    assert same(blocks.cpu(), host.flip(0))
    device.unregister(host)


@LAYOUTS
def test_closing_waits_for_copies_and_ends_registrations(layout: PageLayout) -> None:
    device = CudaDevice(0)
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies: Copies = device.copies(blocks)
    event = copies.up(host, list(range(BLOCKS)), list(range(BLOCKS)))
    device.close()
    assert event.done()
    assert not host.is_pinned()
    device.close()


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@LAYOUTS
def test_a_second_device_is_copied_to_from_any_thread(layout: PageLayout) -> None:
    device = CudaDevice(1)
    host, blocks = filled(device, layout), device.blocks(layout, BLOCKS)
    copies = device.copies(blocks)
    thread = threading.Thread(target=lambda: copies.up(host, [0, 2], [3, 4]).wait(Wait.ARRIVED_AFTER_UP))
    thread.start()
    thread.join()
    assert same(blocks[3].cpu(), host[0])
    assert same(blocks[4].cpu(), host[2])
    device.close()


def _busy(device: Device) -> None:
    """Submits work of some hundred milliseconds."""
    numbers = torch.ones(8192, 8192, device=device.torch_device)
    for _ in range(20):
        numbers = numbers @ numbers * 1e-4
