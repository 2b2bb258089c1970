"""AttnStore's paged attention for transformers and for `attnstore_worker.model.llama`.

Owns: the registration under `ATTENTION_NAME`, and `PagedStep`, which passes one step's tables from the runner to every layer;
transformers passes it on in its keyword arguments. Invariant: a layer stores its new keys and values into the pool before it
attends, so the pool alone determines what a query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, float32, nn, stack
from transformers import AttentionInterface, AttentionMaskInterface

from attnstore.attention import AttentionBackend
from attnstore_worker.cache.attending.step import RemoteStep
from attnstore_worker.errors import ModelUnavailable

ATTENTION_NAME: Final = "attnstore_paged"


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step of packed sequences. All tensors are on the pool's device.

    pool: `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`; new keys and values are written into it.
    slot_blocks, slot_offsets: int64 `[total_q]`, the block and the token position inside it of each query's own key.
    block_tables, context_lens, query_starts: as in `AttentionBackend.paged_attention`.
    remote: queries store nodes about the blocks that come before those of `block_tables`; None if there are none. `context_lens`
    then count only the keys in the tables.
    before_layer: called with each layer's number before its pages are read; returns when they have arrived, or raises `PagesLost`.

    On a device that uses Triton, a step without `remote` and with `at_once` reads no tensor on the host, so a CUDA graph may
    capture it: the tensors are inputs that the next step overwrites. A padding row belongs to a sequence of its own without
    context, and its block is -1: it stores nothing and sees nothing.
    """

    backend: AttentionBackend
    pool: Tensor
    slot_blocks: Tensor
    slot_offsets: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    before_layer: Callable[[int], None]
    remote: RemoteStep | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys_values: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Runs one layer: query `[total_q, q_heads, head_dim]` and its own keys and values `[total_q, 2, kv_heads, head_dim]`,
        rotated.

        sliding_window, soft_cap, sinks: as in `AttentionBackend.paged_attention`. Returns `[total_q, q_heads, head_dim]`. The
        positions imply causality.
        """
        self.before_layer(layer)
        self._put(layer, keys_values)
        return self.attend_stored(layer, query, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks)

    def attend_stored(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `attend`, after the caller called `before_layer` and stored the query's own keys and values into the pool."""
        if self.remote is not None:
            assert soft_cap is None, "nodes answer with plain scores"
            self.remote.ask(layer, query, sliding_window)  # first, so that the nodes compute in parallel
        out, lse = self.backend.paged_attention(
            query,
            self.pool,
            self.block_tables,
            self.context_lens,
            self.query_starts,
            layer=layer,
            scale=scale,
            sliding_window=sliding_window,
            out_dtype=None if self.remote is None else float32,
            soft_cap=soft_cap,
            sinks=sinks,  # only in the local part, so that a sink is counted once
        )
        return out if self.remote is None else self.remote.merge(out, lse).to(query.dtype)

    def _put(self, layer: int, keys_values: Tensor) -> None:
        if self.pool.device.type == "cpu" and keys_values[0].is_contiguous():
            # Not at the top, because they import numba, which a machine with a GPU may lack.
            from attnstore.attention import cpu_pages
            from attnstore.attention.simd import LANES

            _, _, _, kv_heads, block_tokens, head_dim = self.pool.shape
            if head_dim % LANES == 0:
                cpu_pages.put(
                    cpu_pages.elements(self.pool),
                    self.slot_blocks.numpy(),
                    self.slot_offsets.numpy(),
                    self.pool.stride(0),
                    layer * self.pool.stride(1),
                    kv_heads,
                    block_tokens,
                    head_dim,
                    cpu_pages.elements(keys_values),
                    keys_values.stride(0),
                )
                return
        slots = self.pool[:, layer].permute(0, 3, 1, 2, 4)  # [blocks, block_tokens, 2, kv_heads, head_dim]
        slots.index_put_((self.slot_blocks, self.slot_offsets), keys_values)


def at_once(_: int) -> None:
    """No-op: the pages of every layer have arrived."""


def register_attention() -> None:
    """Registers `ATTENTION_NAME` as an `attn_implementation` of transformers. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: PagedStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Runs one layer. query `[1, q_heads, total_q, head_dim]`, key and value `[1, kv_heads, total_q, head_dim]`, rotated.

    Returns `[1, total_q, q_heads, head_dim]` and no weights. The mask is always None, because the positions imply causality. Raises
    `ModelUnavailable` for any other request of a model to its attention: `others` are checked at every call, because a model may
    pass one only from some length on.
    """
    if paged is None:
        raise ModelUnavailable(f"{type(module).__name__} is not given the arguments of its model's call")
    if attention_mask is not None:
        raise ModelUnavailable(f"{type(module).__name__} attends through a mask of its own")
    for name, argument in others.items():
        if not _is_neutral(name, argument):
            raise ModelUnavailable(f"{type(module).__name__} attends with {name}, which is not implemented")
    assert query.shape[0] == 1
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys_values = stack((key[0], value[0])).permute(2, 0, 1, 3)
    out = paged.attend(
        layer,
        query[0].transpose(0, 1),
        keys_values,
        scale=scaling,
        sliding_window=sliding_window,
        soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
    )
    return out.unsqueeze(0), None


def _is_neutral(name: str, argument: object) -> bool:
    """Returns whether the argument requests nothing, or something that is done anyway."""
    if name == "is_causal":
        return argument is None or argument is True
    if name == "position_ids":  # inputs of the layer; the rotated queries and keys already contain them
        return True
    return argument is None or (isinstance(argument, int | float) and not argument)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
