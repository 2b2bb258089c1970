"""vLLM's KV caches as blocks of bytes.

Owns: which dimension of a cache counts its blocks. vLLM lays its caches out in several orders (`LBHNC`, `LBNHC`, `LHBNC`, `BLHNC`,
`BLNHC`, `BHLNC`; older versions keep K and V in two planes). The dimensions of a tensor have one order in all of them, and so has a
page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument
from attnstore_worker.device.engine_blocks import EngineBlocks


def kv_blocks(layers: Sequence[Tensor], *, blocks: int, layer_block_bytes: int) -> EngineBlocks:
    """Returns the blocks of all layers, in the order of the page. `layers`: the cache of each layer, of any strides,
    `[blocks, heads, tokens, K and V]` or `[2, blocks, tokens, heads, dim]`.

    Raises `InvalidArgument` for a tensor that has another number of blocks, or blocks of another size than `layer_block_bytes`.
    """
    return EngineBlocks([_bytes_of(index, layer, blocks, layer_block_bytes) for index, layer in enumerate(layers)])


def _bytes_of(index: int, layer: Tensor, blocks: int, layer_block_bytes: int) -> Tensor:
    shape = tuple(layer.shape)
    if layer.dim() == 5 and shape[:2] == (2, blocks):
        layer = layer.permute(1, 3, 2, 0, 4)
    if len(layer) != blocks or layer[0].numel() * layer.element_size() != layer_block_bytes:
        raise InvalidArgument(
            f"vLLM's layer {index} (tensor {shape} of {layer.element_size()} bytes each) has not the {blocks} blocks of "
            f"{layer_block_bytes} bytes that its cache configuration says"
        )
    if layer.stride(-1) != 1:
        raise InvalidArgument(
            f"vLLM's layer {index} (tensor {shape}, strides {layer.stride()}) is not contiguous in its last dimension"
        )
    return layer.view(torch.uint8)
