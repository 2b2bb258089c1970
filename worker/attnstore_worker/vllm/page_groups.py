"""vLLM's groups of KV caches as pages: what a page of each group holds, and which pages a prefix needs.

Owns: `PageGroup`. vLLM puts layers that keep the same tokens into one group, with blocks of its own: full attention keeps all
tokens, a sliding window the latest ones, and the state of a Mamba or linear-attention layer stands for all tokens before it. A page
is one or more blocks of a group, `[block][layer][bytes of vLLM's block]`. Invariants: a page has neither padding nor tokens that
are not computed; both halves of the connector use the groups that the worker describes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import KIB
from attnstore_worker.vllm.identity import Shard, page_layout

PAGE_BYTES_MIN: Final = 512 * KIB
"""A smaller page costs more for its name, verdict and checksum than for its bytes. A page of full attention has so many blocks."""
PAGE_TOKENS_MAX: Final = 256
"""A hit ends at the end of a page, so a page of many tokens makes hits shorter."""
_STATE_WINDOW: Final = 2
"""The next token needs the state after the last one, and no other: as with a window of itself and the token before."""


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Group `index` of vLLM's. A page has `page_blocks` blocks, and is named after every `page_hashes`-th of vLLM's hashes.

    `window`: how many tokens the next token sees, itself included; None for all. `state`: a page is the state after its last token,
    which a block holds only after a step that ends there. `heads`: K and V heads of a block, if all layers have as many and as many
    bytes. `block_layout`, `layout`: those of a block and of a page.
    """

    index: int
    layer_names: tuple[str, ...]
    layer_bytes: tuple[int, ...]
    block_tokens: int
    page_blocks: int
    page_hashes: int
    window: int | None
    state: bool
    heads: int | None
    block_layout: PageLayout
    layout: PageLayout

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""
        return self.block_tokens * self.page_blocks

    def needed(self, end_tokens: int) -> range:
        """Returns the pages that must be there to continue after `end_tokens` tokens, which end a page."""
        first = 0 if self.window is None else max(0, end_tokens - self.window + 1) // self.page_tokens
        return range(first, end_tokens // self.page_tokens)


def page_groups(kv_cache_config: Any, shard: Shard) -> tuple[PageGroup, ...]:
    """The groups of a worker's `KVCacheConfig`, which `supported` accepts. `shard`: the worker's part of the heads."""
    groups = kv_cache_config.kv_cache_groups
    hash_tokens = int(kv_cache_config.hash_block_size or math.gcd(*(int(group.kv_cache_spec.block_size) for group in groups)))
    return tuple(_page_group(index, group, hash_tokens, shard) for index, group in enumerate(groups))


def hit_unit(groups: Sequence[PageGroup]) -> int:
    """Returns how many tokens lie between two places where a hit may end: whole pages of every group."""
    return math.lcm(*(group.page_tokens for group in groups))


def told_group(groups: Sequence[PageGroup]) -> PageGroup | None:
    """Returns the group of which events tell: the first that keeps all tokens. None if all have windows."""
    return next((group for group in groups if group.window is None), None)


def layer_specs(group: Any) -> Mapping[str, Any]:
    """Returns vLLM's specification of each layer of a group, in order."""
    spec = group.kv_cache_spec
    own: Mapping[str, Any] | None = getattr(spec, "kv_cache_specs", None)  # of a UniformTypeKVCacheSpecs
    return {name: spec if own is None else own[name] for name in group.layer_names}


def _page_group(index: int, group: Any, hash_tokens: int, shard: Shard) -> PageGroup:
    specs = layer_specs(group)
    first = next(iter(specs.values()))
    layer_bytes = tuple(int(spec.real_page_size_bytes) for spec in specs.values())
    block_tokens = int(group.kv_cache_spec.block_size)
    if block_tokens % hash_tokens:
        raise InvalidArgument(f"vLLM hashes {hash_tokens} tokens at once, which does not divide a block of {block_tokens}")
    state = hasattr(first, "mamba_cache_mode")
    window = _STATE_WINDOW if state else _window(first)
    heads = {int(getattr(spec, "num_kv_heads", 1)) for spec in specs.values()}
    alike = not state and len(heads) == 1 and len(set(layer_bytes)) == 1
    return _of_bytes(
        index, tuple(specs), layer_bytes, block_tokens, hash_tokens, window, heads.pop() if alike else None, shard, state=state
    )


def of_shard(group: PageGroup, own: Shard, other: Shard) -> PageGroup:
    """Returns the group of another shard, of another number of shards, given that of the `own`. The group has `heads`, which
    divide.
    """
    assert group.heads is not None
    heads = group.heads * own.count // other.count
    layer_bytes = tuple(size * own.count // other.count for size in group.layer_bytes)
    hash_tokens = group.page_tokens // group.page_hashes
    return _of_bytes(
        group.index, group.layer_names, layer_bytes, group.block_tokens, hash_tokens, group.window, heads, other, state=False
    )


def _of_bytes(
    index: int,
    layer_names: tuple[str, ...],
    layer_bytes: tuple[int, ...],
    block_tokens: int,
    hash_tokens: int,
    window: int | None,
    heads: int | None,
    shard: Shard,
    *,
    state: bool,
) -> PageGroup:
    page_blocks = _page_blocks(sum(layer_bytes), block_tokens) if window is None else 1

    def layout(blocks: int) -> PageLayout:
        if heads is None:
            return _opaque_layout(blocks * sum(layer_bytes), shard)
        return page_layout(
            layers=len(layer_names),
            layer_block_bytes=blocks * layer_bytes[0],
            kv_heads=heads,
            block_tokens=blocks * block_tokens,
            tp_rank=shard.index,
            tp_size=shard.count,
        )

    return PageGroup(
        index=index,
        layer_names=layer_names,
        layer_bytes=layer_bytes,
        block_tokens=block_tokens,
        page_blocks=page_blocks,
        page_hashes=page_blocks * block_tokens // hash_tokens,
        window=window,
        state=state,
        heads=heads,
        block_layout=layout(1),
        layout=layout(page_blocks),
    )


def _window(spec: Any) -> int | None:
    """The window of a specification whose manager gives up the blocks before it. `FullAttentionSpec` may have one and keeps all."""
    if type(spec).__name__ != "SlidingWindowSpec":
        return None
    return int(spec.sliding_window) + int(spec.extra_retained_tokens)


def _page_blocks(block_bytes: int, block_tokens: int) -> int:
    blocks = 1
    while blocks * block_bytes < PAGE_BYTES_MIN and 2 * blocks * block_tokens <= PAGE_TOKENS_MAX:
        blocks *= 2
    return blocks


def _opaque_layout(size_bytes: int, shard: Shard) -> PageLayout:
    """A layout of bytes that are not K and V of heads and tokens. Raises `InvalidArgument` for an odd number of bytes."""
    half, odd = divmod(size_bytes, 2)
    rows = next((rows for rows in range(-(-half // (1 << 20)), half + 1) if half % rows == 0), 1)
    if odd:
        raise InvalidArgument(f"a page of {size_bytes} bytes has no layout: it must have an even number of bytes")
    return PageLayout(1, 1, half // rows, rows, DType.OPAQUE, shard.index, shard.count)
