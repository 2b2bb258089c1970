"""What a page of each of vLLM's groups holds, and which pages a prefix needs. Configurations are made like those of vLLM 0.32."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from attnstore.errors import InvalidArgument
from attnstore.limits import KIB
from attnstore_worker.vllm.identity import shard_of
from attnstore_worker.vllm.page_groups import PAGE_BYTES_MIN, PageGroup, hit_unit, page_groups, told_group

SHARD = shard_of(0, tp_size=1, replicas=1)


class FullAttentionSpec(SimpleNamespace):
    """vLLM's class, with the fields that pages need."""


class SlidingWindowSpec(FullAttentionSpec):
    """vLLM's class."""


class MambaSpec(FullAttentionSpec):
    """vLLM's class."""


def full(block_tokens: int = 16, size_bytes: int = 32 * KIB, heads: int = 2, **fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_tokens, num_kv_heads=heads, real_page_size_bytes=size_bytes, **fields)


def sliding(window: int, block_tokens: int = 16, size_bytes: int = 32 * KIB, extra: int = 0) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_tokens,
        num_kv_heads=2,
        real_page_size_bytes=size_bytes,
        sliding_window=window,
        extra_retained_tokens=extra,
    )


def state(block_tokens: int = 16, size_bytes: int = 32 * KIB) -> MambaSpec:
    return MambaSpec(block_size=block_tokens, real_page_size_bytes=size_bytes, mamba_cache_mode="align")


def groups_of(*specs: Any, layers: int = 4, hash_tokens: int | None = None) -> tuple[PageGroup, ...]:
    groups = [
        SimpleNamespace(kv_cache_spec=spec, layer_names=[f"{index}.{layer}" for layer in range(layers)])
        for index, spec in enumerate(specs)
    ]
    return page_groups(SimpleNamespace(kv_cache_groups=groups, hash_block_size=hash_tokens), SHARD)


def test_a_page_of_full_attention_has_as_many_blocks_as_make_it_large() -> None:
    (group,) = groups_of(full())
    assert (group.page_blocks, group.page_tokens, group.page_hashes) == (4, 64, 4)
    assert group.layout.page_bytes == 4 * group.block_layout.page_bytes == PAGE_BYTES_MIN
    (large,) = groups_of(full(size_bytes=PAGE_BYTES_MIN))
    assert (large.page_blocks, large.layout) == (1, large.block_layout)
    (tiny,) = groups_of(full(size_bytes=64))
    assert tiny.page_tokens == 256, "pages of more tokens would make hits shorter"
    (long,) = groups_of(full(block_tokens=128, size_bytes=96 * KIB), layers=30)
    assert long.page_blocks == 1


def test_a_window_and_a_state_have_pages_of_one_block() -> None:
    whole, window, last = groups_of(full(), sliding(40), state())
    assert (window.page_blocks, last.page_blocks) == (1, 1)
    assert [group.state for group in (whole, window, last)] == [False, False, True]
    assert hit_unit([whole, window, last]) == 64
    assert told_group([window, whole]) is whole
    assert told_group([window, last]) is None


@pytest.mark.parametrize(
    ("window", "end", "needed"),
    [
        (40, 64, range(1, 4)),  # the next token, at 64, sees tokens from 25 on
        (17, 64, range(3, 4)),
        (18, 64, range(2, 4)),
        (1_000, 64, range(4)),
        (40, 16, range(1)),
    ],
)
def test_of_a_window_only_its_tokens_are_needed(window: int, end: int, needed: range) -> None:
    (group,) = groups_of(sliding(window))
    assert group.needed(end) == needed


def test_of_states_only_the_last_and_of_full_attention_everything_is_needed() -> None:
    whole, last = groups_of(full(), state())
    assert last.needed(64) == range(3, 4)
    assert last.needed(16) == range(1)
    assert whole.needed(128) == range(2)
    (kept,) = groups_of(sliding(17, extra=1))
    assert kept.needed(64) == range(2, 4), "vLLM keeps a token more than the window has"


def test_groups_of_unequal_blocks_are_hashed_at_what_divides_them() -> None:
    whole, window = groups_of(full(block_tokens=32, size_bytes=PAGE_BYTES_MIN), sliding(64, block_tokens=16))
    assert (whole.page_hashes, window.page_hashes, hit_unit([whole, window])) == (2, 1, 32)
    with pytest.raises(InvalidArgument, match="hashes 12 tokens"):
        groups_of(full(), hash_tokens=12)


def test_layers_of_unequal_sizes_make_a_page_of_all_their_bytes() -> None:
    unequal = SimpleNamespace(
        block_size=16, kv_cache_specs={"0.0": full(size_bytes=300_000), "0.1": full(size_bytes=300_002, heads=1)}
    )
    (group,) = groups_of(unequal, layers=2)
    assert group.layer_bytes == (300_000, 300_002)
    assert group.layout.page_bytes == 600_002
    assert group.block_layout.page_bytes == 600_002
    (odd,) = groups_of(state(size_bytes=3), layers=2)
    assert odd.layout.page_bytes == 6
    with pytest.raises(InvalidArgument, match="even number"):
        groups_of(state(size_bytes=3), layers=1)


def test_the_worker_sends_its_groups_to_the_scheduler() -> None:
    groups = groups_of(full(), sliding(40), state())
    assert pickle.loads(pickle.dumps(groups)) == groups
