"""vLLM's KV caches as blocks of bytes.

Owns: which dimension of a cache counts its blocks. vLLM lays its caches out in several orders (`LBHNC`, `LBNHC`, `LHBNC`, `BLHNC`,
`BLNHC`, `BHLNC`; older versions keep K and V in two planes), and may split a block into smaller ones for its kernels. The
dimensions of a tensor have one order in all of them, and so has a page. The state of a Mamba layer is several tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument
from attnstore_worker.device.engine_blocks import EngineBlocks

LayerCache = Tensor | Sequence[Tensor]


def kv_blocks(
    layers: Sequence[LayerCache], *, blocks: int, layer_bytes: Sequence[int], head_part: int = 0, head_parts: int = 1
) -> EngineBlocks:
    """Returns the blocks of all layers, in the order of the page. `layers`: the cache of each layer, of any strides: one of
    `[blocks, heads, tokens, K and V]` or `[2, blocks, tokens, heads, dim]`, where kernels may split each block into several of
    fewer tokens; or the tensors of a state, each `[blocks, ...]`. `layer_bytes`: those of a block of each layer, without padding.
    The blocks have one of `head_parts` equal parts of the heads.

    Raises `InvalidArgument` for a layer that has another number of blocks, or blocks of another size.
    """
    parts: list[Tensor] = []
    for index, (layer, size_bytes) in enumerate(zip(layers, layer_bytes, strict=True)):
        own = [_tokens_together(layer, blocks)] if isinstance(layer, Tensor) else list(layer)
        found = [(len(part), part[0].numel() * part.element_size()) for part in own]
        if any(count != blocks for count, _ in found) or sum(size for _, size in found) != size_bytes:
            raise InvalidArgument(
                f"vLLM's layer {index} has blocks of {found} (number, bytes), and its cache configuration says {blocks} of "
                f"{size_bytes}"
            )
        if head_parts > 1:
            own = [torch.unflatten(part, 1, (head_parts, -1))[:, head_part] for part in own]
        parts += (_bytes_of(index, part) for part in own)
    return EngineBlocks(parts)


def _tokens_together(layer: Tensor, blocks: int) -> Tensor:
    """Returns a cache as `[blocks, heads, tokens, ...]`; of kernels' blocks as `[blocks, heads, kernel blocks, tokens, ...]`."""
    if layer.dim() == 5 and len(layer) == 2 != blocks:
        layer = layer.permute(1, 3, 2, 0, 4)
    elif layer.dim() > 4:
        raise InvalidArgument(f"a cache of vLLM has {layer.dim()} dimensions {tuple(layer.shape)}, whose order is not known")
    if len(layer) == blocks or len(layer) % blocks or layer.dim() < 4:
        return layer
    return torch.unflatten(layer, 0, (blocks, -1)).movedim(1, 2)


def _bytes_of(index: int, part: Tensor) -> Tensor:
    if part.stride(-1) != 1:
        raise InvalidArgument(
            f"vLLM's layer {index} (tensor {tuple(part.shape)}, strides {part.stride()}) is not contiguous in its last dimension"
        )
    return part.view(torch.uint8)
