"""Engines of unequal tensor-parallel sizes on one store: each rank reads its heads out of what others have written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.limits import KIB
from attnstore.testing import StoreProcess
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.vllm import worker_pages as assembly
from attnstore_worker.vllm.identity import page_hashes, shard_of
from attnstore_worker.vllm.page_groups import page_groups
from attnstore_worker.vllm.plan import NO_BLOCK, Pages, RequestLoad
from attnstore_worker.vllm.settings import Settings
from attnstore_worker.vllm.shards import ToldSources, sources
from attnstore_worker.vllm.transfers import Transfers
from tests.samples import eventually

HEADS, LAYERS, TOKENS, WIDTH, BLOCKS = 4, 2, 16, 2_048, 16
SIZES = (1, 2, 4)
FOREIGN = [bytes((index,)) * 32 for index in range(BLOCKS)]


@dataclass(frozen=True)
class FullAttentionSpec:
    """vLLM's class, with the fields that pages and names need."""

    num_kv_heads: int = HEADS
    block_size: int = TOKENS
    page_size_padded: int | None = None

    @property
    def real_page_size_bytes(self) -> int:
        return self.num_kv_heads * TOKENS * WIDTH * 2


def whole_model(seed: int) -> torch.Tensor:
    """Blocks of all heads, `[layer, block, head, token, K and V]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, (LAYERS, BLOCKS, HEADS, TOKENS, WIDTH), dtype=torch.int16, generator=generator)


class Rank:
    """A rank of an engine of `size` ranks, with its heads of `model`. Pages are named by what the `first` rank has told."""

    def __init__(
        self, client: Any, size: int, rank: int, model: torch.Tensor, device: Any = None, first: Rank | None = None
    ) -> None:
        heads = HEADS // size
        self.heads = slice(rank * heads, (rank + 1) * heads)
        # Tokens before heads in memory, as vLLM's may lie.
        self.caches = [layer[:, self.heads].transpose(1, 2).contiguous().transpose(1, 2) for layer in model]
        config = SimpleNamespace(
            num_blocks=BLOCKS,
            hash_block_size=TOKENS,
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec(heads), layer_names=["a", "b"])],
        )
        vllm = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=BLOCKS * TOKENS))
        self.shard = shard_of(rank, tp_size=size, replicas=1)
        clock = MonotonicClock()

        def tier(group: Any, space: Namespace, _tells: bool) -> RemoteTier:
            return RemoteTier(client, space, group.layout, deadline_ms=5_000, clock=clock)

        self.told: ToldSources
        self.told, stores = assembly.worker_pages(
            vllm, config, self.shard, Settings.parse({"store": "-", "tensor_parallel_sizes": SIZES}),
            dict(zip("ab", self.caches, strict=True)), tier, loaded_since_s=0.0,
        )  # fmt: skip
        self.transfers = Transfers(stores, device or HostDevice(), clock, save_bytes_max=1 << 24)
        self.scheduled = self.told if first is None else first.told

    def names(self, source: int, pages: int) -> list[BlockHash]:
        group, space = self.scheduled[source][0][0]
        return page_hashes(space, FOREIGN[group.page_hashes - 1 :: group.page_hashes])[:pages]

    def save(self, blocks: int) -> None:
        group, _ = self.told[0][0][0]
        self.transfers.save([Pages(0, self.names(0, blocks // group.page_blocks), range(blocks))])
        self.transfers.flush()

    def load(self, source: int, block_ids: list[int]) -> set[int]:
        """Returns the blocks that have failed."""
        group, _ = self.told[source][0][0]
        names = self.names(source, len(block_ids) // group.page_blocks)
        self.transfers.load(RequestLoad("r", (Pages(0, names, block_ids),), source))
        assert eventually(lambda: "r" in self.transfers.take_loaded(), within_s=20)
        return self.transfers.take_failed_blocks()

    def source_of(self, size: int) -> int:
        counts = [ranges[0][0][0].layout.tp_size for ranges in self.told]
        return counts.index(size)


def engine(client: Any, size: int, model: torch.Tensor, device: Any = HostDevice) -> list[Rank]:
    first = Rank(client, size, 0, model, device())
    return [first, *(Rank(client, size, rank, model, device(), first) for rank in range(1, size))]


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "kv_settings", lambda *_, **__: {"model": "m"})
    monkeypatch.setattr(assembly, "_order", lambda *_: "order")


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB") as node:
        yield node


@pytest.mark.parametrize("device", [HostDevice, SimulatedDevice])
@pytest.mark.parametrize("written_by", SIZES)
@pytest.mark.parametrize("read_by", SIZES)
def test_every_rank_reads_its_heads_of_what_an_engine_of_another_size_has_written(
    node: StoreProcess, written_by: int, read_by: int, device: Any
) -> None:
    model, other = whole_model(1), whole_model(2)
    with attnstore.connect(node.url) as client:
        for writer in engine(client, written_by, model):
            writer.save(8)
        for reader in engine(client, read_by, other, device):
            before = [cache.clone() for cache in reader.caches]
            blocks = [NO_BLOCK, *range(9, 16)]
            assert reader.load(reader.source_of(written_by), blocks) == set()
            for cache, unchanged, layer in zip(reader.caches, before, model, strict=True):
                assert torch.equal(cache[9:], layer[1:8, reader.heads])
                assert torch.equal(cache[:9], unchanged[:9]), "the first block of the first page is vLLM's"
            reader.transfers.flush()


def test_a_page_that_one_of_several_shards_lacks_is_a_miss(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        ranks = engine(client, 2, whole_model(3))
        for rank in ranks:
            rank.save(8)
        _, space = ranks[1].told[0][0][0]
        pages = 8 // ranks[1].told[0][0][0][0].page_blocks
        client.delete(space, ranks[1].names(0, pages)[-1:])
        reader = Rank(client, 1, 0, whole_model(4))
        kept = 8 - ranks[1].told[0][0][0][0].page_blocks
        assert reader.load(reader.source_of(2), list(range(8))) == set(range(kept, 8))
        reader.transfers.flush()


def test_a_rank_has_its_own_names_first_and_those_of_an_engine_of_another_size_are_that_engines() -> None:
    model = whole_model(5)
    told = {(size, rank): Rank(None, size, rank, model).told for size in SIZES for rank in range(size)}
    own = {key: sources[0][0][0][1] for key, sources in told.items()}
    assert len(set(own.values())) == 1 + 2 + 4
    assert {space for ranges in told[1, 0][1:] for part in ranges for _, space in part} == {
        own[size, rank] for size in (2, 4) for rank in range(size)
    }
    assert [space for ranges in told[4, 3][1:] for part in ranges for _, space in part] == [own[1, 0], own[2, 1]]
    assert [space for part in told[2, 1][2] for _, space in part] == [own[4, 2], own[4, 3]]


def spec_groups(*specs: Any) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[f"{index}a", f"{index}b"]) for index, spec in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups, hash_block_size=TOKENS)


def test_sizes_that_do_not_divide_and_caches_without_heads_have_only_their_own_pages() -> None:
    whole = shard_of(0, tp_size=1, replicas=1)

    def counts(heads: int, size: int) -> list[int]:
        groups = page_groups(spec_groups(FullAttentionSpec(heads)), whole)
        return [source.ranges[0].shard.count for source in sources(groups, whole, [size])]

    assert (counts(4, 3), counts(6, 4), counts(4, 1)) == ([1], [1], [1])
    assert counts(8, 16) == [1, 8], "an engine with more ranks than heads has a shard for each head"
    of_three = shard_of(1, tp_size=3, replicas=1)
    assert len(sources(page_groups(spec_groups(FullAttentionSpec(2)), of_three), of_three, [2])) == 1
    state = SimpleNamespace(block_size=TOKENS, real_page_size_bytes=KIB, mamba_cache_mode="align")
    assert len(sources(page_groups(spec_groups(FullAttentionSpec(), state), whole), whole, [2])) == 1
    latents = replace(FullAttentionSpec(), num_kv_heads=1)
    assert len(sources(page_groups(spec_groups(latents), whole), whole, [2])) == 1
