"""vLLM's KV cache as pages: the bytes of one block of all layers, out of vLLM's tensors and into them.

Owns: the order of the bytes. Invariant: `scatter` of a page from `gather` restores the block bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument


class KvPages:
    """`layers`: each layer's cache `[block, ...]`, in the order of the page. Every block of a layer has `layer_block_bytes` bytes.

    Raises `InvalidArgument` where a tensor has blocks of another size.
    """

    def __init__(self, layers: Sequence[Tensor], layer_block_bytes: int) -> None:
        for index, layer in enumerate(layers):
            block_bytes = layer[0].numel() * layer.element_size()
            if block_bytes != layer_block_bytes:
                raise InvalidArgument(
                    f"vLLM's layer {index} has blocks of {block_bytes} bytes (tensor {tuple(layer.shape)}); "
                    f"its cache configuration says {layer_block_bytes}"
                )
        self._layers = tuple(layers)
        self._layer_block_bytes = layer_block_bytes
        self.page_bytes = layer_block_bytes * len(layers)

    def gather(self, block_id: int) -> bytearray:
        """The page of a block: a copy, so that vLLM may reuse the block as soon as this returns."""
        page = bytearray(self.page_bytes)
        for part, layer in zip(self._parts(page), self._layers, strict=True):
            block = layer[block_id]
            part.view(block.dtype).view(block.shape).copy_(block)
        return page

    def scatter(self, block_id: int, page: bytearray | memoryview) -> None:
        """Puts a page into a block."""
        for part, layer in zip(self._parts(page), self._layers, strict=True):
            block = layer[block_id]
            block.copy_(part.view(block.dtype).view(block.shape))

    def _parts(self, page: bytearray | memoryview) -> tuple[Tensor, ...]:
        whole = torch.frombuffer(page, dtype=torch.uint8).view(len(self._layers), self._layer_block_bytes)
        return whole.unbind()
