"""Blocks of a cache with vLLM's structure, to a real node and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import pytest
import torch

import attnstore
from attnstore.clock import Clock, MonotonicClock
from attnstore.core.layout import PageLayout
from attnstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from attnstore.testing import ManualClock, StoreProcess
from attnstore.testing.ports import free_port
from attnstore.types import ReadResult
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.pages import PagePool
from attnstore_worker.vllm import identity
from attnstore_worker.vllm.group_pages import GroupStore
from attnstore_worker.vllm.identity import page_hashes, page_layout, vllm_namespace
from attnstore_worker.vllm.kv_pages import kv_blocks
from attnstore_worker.vllm.plan import Pages, RequestLoad
from attnstore_worker.vllm.probe import probe_link
from attnstore_worker.vllm.transfers import Transfers
from tests.samples import eventually

LAYERS, HEADS, TOKENS, WIDTH, BLOCKS = 3, 2, 16, 128, 12
LAYER_BYTES = HEADS * TOKENS * WIDTH * 2
LAYOUT = page_layout(layers=LAYERS, layer_block_bytes=LAYER_BYTES, kv_heads=HEADS, block_tokens=TOKENS, tp_rank=0, tp_size=1)
SPACE = vllm_namespace(LAYOUT, {"model": "m"}, tenant_salt="")
NAMES = page_hashes(SPACE, [bytes((index,)) * 32 for index in range(BLOCKS)])


def make_cache(seed: int) -> list[torch.Tensor]:
    """A layer is a view of `[block, head, token, K||V]` whose memory has another order, as vLLM's may have."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(BLOCKS, TOKENS, HEADS, WIDTH, generator=generator).to(torch.bfloat16).transpose(1, 2) for _ in range(LAYERS)
    ]


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB") as node:
        yield node


def moving(
    store: object,
    cache: list[torch.Tensor],
    *,
    deadline_ms: float = 5_000,
    save_bytes_max: int = 1 << 20,
    part_bytes: int = 1 << 20,
    clock: Clock = MonotonicClock(),  # noqa: B008
    whole: bool = False,
) -> Transfers:
    """Transfers between a store and a cache."""
    tier = RemoteTier(cast("PageStore", store), SPACE, LAYOUT, deadline_ms=deadline_ms, clock=clock)
    blocks = kv_blocks(cache, blocks=BLOCKS, layer_bytes=[LAYER_BYTES] * LAYERS)
    group = GroupStore(tier, blocks, LAYOUT, LAYOUT, page_blocks=1, step_pages=BLOCKS)
    return Transfers([[[group]]], HostDevice(), clock, save_bytes_max=save_bytes_max, part_bytes=part_bytes, whole=whole)


@pytest.fixture
def transfers_of(node: StoreProcess) -> Iterator[Callable[[list[torch.Tensor]], Transfers]]:
    with attnstore.connect(node.url) as client:
        made: list[Transfers] = []

        def make(cache: list[torch.Tensor], save_bytes_max: int = 1 << 20) -> Transfers:
            made.append(moving(client, cache, save_bytes_max=save_bytes_max))
            return made[-1]

        yield make
        for each in made:
            each.flush()


def plans(first: int, last: int, shift: int = 0) -> tuple[Pages]:
    return (Pages(0, NAMES[first:last], range(first + shift, last + shift)),)


def wait_loaded(transfers: Transfers, *requests: str) -> None:
    left = set(requests)

    def all_loaded() -> bool:
        left.difference_update(transfers.take_loaded())
        return not left

    assert eventually(all_loaded, within_s=20)


def test_blocks_come_back_bit_by_bit_in_another_process_place(transfers_of: Callable[..., Transfers]) -> None:
    source, target = make_cache(1), make_cache(2)
    untouched = [layer.clone() for layer in target]
    writer = transfers_of(source)
    writer.save(plans(0, 4))
    writer.flush()
    reader = transfers_of(target)
    reader.load(RequestLoad("r", plans(0, 4, shift=5)))
    wait_loaded(reader, "r")
    assert reader.take_failed_blocks() == set()
    for before, layer, wanted in zip(untouched, target, source, strict=True):
        assert torch.equal(layer[5:9], wanted[0:4])
        assert torch.equal(layer[:5], before[:5])
        assert torch.equal(layer[9:], before[9:])
    (load,) = reader.take_loads()
    assert (load.pages_asked, load.pages, load.bytes) == (4, 4, 4 * LAYOUT.page_bytes)
    assert load.ended_ms > load.started_ms


def test_what_follows_a_miss_is_reported_and_not_written(transfers_of: Callable[..., Transfers]) -> None:
    source, target = make_cache(3), make_cache(4)
    untouched = [layer.clone() for layer in target]
    writer = transfers_of(source)
    writer.save(plans(6, 8))  # 8 is missing
    writer.save(plans(9, 10))
    writer.flush()
    reader = transfers_of(target)
    reader.load(RequestLoad("r", plans(6, 10)))
    wait_loaded(reader, "r")
    assert reader.take_failed_blocks() == {8, 9}
    assert reader.take_failed_blocks() == set(), "told once"
    for before, layer in zip(untouched, target, strict=True):
        assert torch.equal(layer[8:], before[8:])


def test_of_a_load_that_vllm_can_use_whole_only_the_request_is_reported(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        client.register_layout(SPACE, LAYOUT)
        client.delete(SPACE, NAMES)  # other tests saved other pages under these names
        writer = moving(client, make_cache(3))
        writer.save(plans(0, 2))
        writer.flush()
        reader = moving(client, make_cache(4), whole=True)
        reader.load(RequestLoad("whole", plans(0, 2)))
        reader.load(RequestLoad("in part", plans(0, 3)))
        wait_loaded(reader, "whole", "in part")
        assert reader.take_failed_requests() == {"in part"}
        assert reader.take_failed_requests() == set(), "told once"
        assert reader.take_failed_blocks() == set()
        reader.flush()


def test_a_save_is_a_copy_and_what_passes_the_bound_is_not_saved(transfers_of: Callable[..., Transfers]) -> None:
    source = make_cache(5)
    kept = source[0][10].clone()
    writer = transfers_of(source, save_bytes_max=LAYOUT.page_bytes)
    writer.save(plans(10, 12))
    for layer in source:
        layer.zero_()
    writer.flush()
    target = make_cache(6)
    reader = transfers_of(target)
    reader.load(RequestLoad("r", plans(10, 12)))
    wait_loaded(reader, "r")
    assert reader.take_failed_blocks() == {11}
    assert torch.equal(target[0][10], kept)


def test_a_store_that_is_gone_fails_every_block_within_the_deadline() -> None:
    with attnstore.connect("grpc://127.0.0.1:9", deadline_ms=300) as client:
        transfers = moving(client, make_cache(7), deadline_ms=300)
        transfers.save(plans(0, 2))
        transfers.load(RequestLoad("r", plans(0, 3)))
        wait_loaded(transfers, "r")
        assert transfers.take_failed_blocks() == {0, 1, 2}
        transfers.flush()


def of_version(version: int, client: object, cache: list[torch.Tensor], page_blocks: int) -> tuple[Transfers, list[bytes]]:
    """Transfers of a connector whose pages have names of `version` and as many blocks, and the names of the first pages."""
    tokens = page_blocks * TOKENS
    layout = page_layout(
        layers=LAYERS, layer_block_bytes=page_blocks * LAYER_BYTES, kv_heads=HEADS, block_tokens=tokens, tp_rank=0, tp_size=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "NAMES_VERSION", version)
        space = vllm_namespace(layout, {"model": "m"}, tenant_salt="")
    tier = RemoteTier(cast("PageStore", client), space, layout, deadline_ms=5_000, clock=MonotonicClock())
    blocks = kv_blocks(cache, blocks=BLOCKS, layer_bytes=[LAYER_BYTES] * LAYERS)
    group = GroupStore(tier, blocks, LAYOUT, layout, page_blocks=page_blocks, step_pages=BLOCKS)
    names = page_hashes(space, [bytes((index,)) * 32 for index in range(BLOCKS // page_blocks)])
    return Transfers([[[group]]], HostDevice(), MonotonicClock(), save_bytes_max=1 << 20), [*names]


def test_two_versions_of_the_connector_use_one_store_and_a_store_that_starts_again_with_pages_of_another_size() -> None:
    old, new = make_cache(20), make_cache(21)
    address = f"127.0.0.1:{free_port()}"
    pages = [Pages(0, [], range(4)), Pages(0, [], range(4))]

    def saved_and_loaded(client: attnstore.Client | attnstore.ClusterClient, order: tuple[int, int]) -> None:
        """Both versions save, in this order, and each loads its own four blocks; neither finds a page of the other."""
        of = [of_version(1, client, old, 1), of_version(2, client, new, 2)]
        for version in order:
            transfers, names = of[version]
            transfers.save([replace(pages[version], names=names[: 4 // (1 + version)])])
            transfers.flush()
        for version, source in enumerate((old, new)):
            target = make_cache(22)
            reader, names = of_version(1 + version, client, target, 1 + version)
            reader.load(RequestLoad("r", (replace(pages[version], names=names[: 4 // (1 + version)]),)))
            wait_loaded(reader, "r")
            assert reader.take_failed_blocks() == set()
            assert all(torch.equal(layer[:4], wanted[:4]) for layer, wanted in zip(target, source, strict=True))
            reader.flush()

    with StoreProcess("--listen", address, "--capacity", "64MiB") as node, attnstore.connect(node.url) as client:
        saved_and_loaded(client, (0, 1))
        assert client.stats().pages_sealed == 4 + 2
        node.kill()
        with StoreProcess("--listen", address, "--capacity", "32MiB"):
            saved_and_loaded(client, (1, 0))


class BreaksAfter:
    """A store that disappears after some reads."""

    def __init__(self, client: attnstore.Client, reads: int) -> None:
        self._client = client
        self._reads = reads

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def read(self, *arguments: Any, **options: Any) -> ReadResult:
        self._reads -= 1
        if self._reads < 0:
            raise Unavailable("gone")
        return self._client.read(*arguments, **options)


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_what_came_before_the_store_broke_is_kept(node: StoreProcess, reads: int) -> None:
    source, target = make_cache(8), make_cache(9)
    untouched = [layer.clone() for layer in target]
    with attnstore.connect(node.url) as client:
        client.register_layout(SPACE, LAYOUT)
        client.delete(SPACE, NAMES)  # other tests saved other pages under these names
        writer = moving(client, source)
        writer.save(plans(0, 8))
        writer.flush()
        reader = moving(BreaksAfter(client, reads), target, part_bytes=2 * LAYOUT.page_bytes)
        reader.load(RequestLoad("r", plans(0, 8)))
        wait_loaded(reader, "r")
        failed = reader.take_failed_blocks()
        reader.flush()
    kept = 2 * reads
    assert failed == set(range(kept, 8))
    for before, layer, wanted in zip(untouched, target, source, strict=True):
        assert torch.equal(layer[:kept], wanted[:kept])
        assert torch.equal(layer[kept:], before[kept:])


def test_a_load_for_which_there_is_no_memory_is_reported_as_failed(
    transfers_of: Callable[..., Transfers], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise MemoryError

    reader = transfers_of(make_cache(10))
    monkeypatch.setattr(PagePool, "__init__", refuse)
    reader.load(RequestLoad("r", plans(0, 2)))
    wait_loaded(reader, "r")
    assert reader.take_failed_blocks() == {0, 1}


def test_a_save_that_cannot_be_copied_keeps_no_room_from_later_ones(
    transfers_of: Callable[..., Transfers], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = transfers_of(make_cache(11), save_bytes_max=LAYOUT.page_bytes)

    def refuse(_blocks: EngineBlocks, _block_id: int) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(EngineBlocks, "views", refuse)
        with pytest.raises(MemoryError):
            writer.save(plans(0, 1))
    writer.save(plans(11, 12))
    writer.flush()
    reader = transfers_of(make_cache(14))
    reader.load(RequestLoad("r", plans(11, 12)))
    wait_loaded(reader, "r")
    assert reader.take_failed_blocks() == set(), "there was room for it"


def test_a_cache_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="blocks of"):
        kv_blocks(make_cache(8), blocks=BLOCKS, layer_bytes=[LAYER_BYTES * 2] * LAYERS)


class Hung:
    """A store that answers nothing before the test says so, and then that the deadline has passed. Registering takes 200 ms."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.answers = threading.Event()
        self.asked: list[tuple[str, float]] = []

    def register_layout(self, _space: bytes, _layout: PageLayout, /, *, deadline_ms: float) -> None:
        self.asked.append(("register", deadline_ms))
        self._clock.advance_ms(200)

    def read(self, *_: Any, deadline_ms: float, **__: Any) -> ReadResult:
        return self._hang("read", deadline_ms)

    def write(self, *_: Any, deadline_ms: float) -> Any:
        return self._hang("write", deadline_ms)

    def _hang(self, call: str, deadline_ms: float) -> Any:
        self.asked.append((call, deadline_ms))
        assert self.answers.wait(20)
        raise DeadlineExceeded("no answer")


@pytest.fixture
def hung() -> Iterator[tuple[Hung, ManualClock, Transfers]]:
    clock = ManualClock()
    store = Hung(clock)
    transfers = moving(store, make_cache(12), deadline_ms=500, clock=clock)
    yield store, clock, transfers
    store.answers.set()
    transfers.flush()


def test_the_deadline_of_a_load_counts_while_it_waits_for_its_turn(hung: tuple[Hung, ManualClock, Transfers]) -> None:
    store, clock, transfers = hung
    for request in range(10):
        transfers.load(RequestLoad(str(request), plans(request, request + 1)))
    assert eventually(lambda: sum(call == "read" for call, _ in store.asked) == 2), "two are under way"
    clock.advance_ms(500)
    store.answers.set()
    wait_loaded(transfers, *map(str, range(10)))
    assert transfers.take_failed_blocks() == set(range(10)), "each is a miss, which vLLM computes"
    assert sum(call == "read" for call, _ in store.asked) == 2, "the store was not asked when their time was over"


def test_all_that_a_load_asks_the_store_shares_its_deadline(hung: tuple[Hung, ManualClock, Transfers]) -> None:
    store, _, transfers = hung
    transfers.load(RequestLoad("r", plans(0, 1)))
    assert eventually(lambda: len(store.asked) == 2)
    assert store.asked == [("register", 500), ("read", 300)]


def test_what_a_hung_store_has_not_taken_when_vllm_ends_is_given_up(hung: tuple[Hung, ManualClock, Transfers]) -> None:
    store, clock, transfers = hung
    for block in range(8):
        transfers.save(plans(block, block + 1))
    assert eventually(lambda: len(store.asked) == 2)
    ending = threading.Thread(target=transfers.flush)
    ending.start()
    ending.join(20)
    assert not ending.is_alive(), "it waits for one deadline, though the store has answered nothing"
    clock.advance_ms(500)
    store.answers.set()
    assert [call for call, _ in store.asked] == ["register", "write"], "seven more would have had 500 ms each"


class SeenClock(ManualClock):
    """Says when a thread of the name `ending` has asked it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def now_ms(self) -> float:
        now_ms = super().now_ms()
        if threading.current_thread().name == "ending":
            self.asked.set()
        return now_ms


class LateStore(Hung):
    """Its writes end when the test says so, its reads later."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.written = threading.Event()

    def write(self, *_: Any, deadline_ms: float) -> Any:
        self.asked.append(("write", deadline_ms))
        assert self.written.wait(20)
        raise DeadlineExceeded("no answer")


def test_the_end_waits_one_deadline_for_writes_and_loads_together() -> None:
    clock = SeenClock()
    store = LateStore(clock)
    transfers = moving(store, make_cache(12), deadline_ms=60_000, clock=clock)
    transfers.save(plans(0, 1))
    transfers.load(RequestLoad("r", plans(1, 2)))
    assert eventually(lambda: {call for call, _ in store.asked} >= {"write", "read"})
    ending = threading.Thread(target=transfers.flush, name="ending")
    ending.start()
    assert clock.asked.wait(20)
    clock.advance_ms(60_000)
    store.written.set()
    ending.join(20)
    assert not ending.is_alive(), "the load would have had another 60 s"
    store.answers.set()
    wait_loaded(transfers, "r")


def test_a_load_that_no_thread_can_run_is_a_miss(transfers_of: Callable[..., Transfers], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    reader = transfers_of(make_cache(14))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        reader.load(RequestLoad("r", plans(0, 2)))
    assert reader.take_loaded() == {"r"}
    assert reader.take_failed_blocks() == {0, 1}


def test_ten_loads_from_a_node_that_hangs_all_end() -> None:
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url, deadline_ms=300) as client:
        writer = moving(client, make_cache(13))
        writer.save(plans(0, 10))
        writer.flush()
        assert client.stats().pages_sealed == 10
        transfers = moving(client, make_cache(13), deadline_ms=300)
        node.suspend()
        for request in range(10):
            transfers.load(RequestLoad(str(request), plans(request, request + 1)))
        for request in range(10):
            transfers.save(plans(request, request + 1))
        wait_loaded(transfers, *map(str, range(10)))
        assert transfers.take_failed_blocks() == set(range(10))
        transfers.flush()
        node.resume()


def test_the_measurements_of_a_link_share_a_deadline() -> None:
    clock = ManualClock()
    store = Hung(clock)
    store.answers.set()
    assert probe_link(cast("PageStore", store), SPACE, LAYOUT, clock, deadline_ms=500) == ()
    assert store.asked == [("register", 500), ("write", 300)]
