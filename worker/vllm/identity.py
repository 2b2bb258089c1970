"""What names a vLLM block's bytes in the store.

Owns: the layout, the namespace and the hashes of vLLM's pages. Invariant: two vLLM processes share a page only where every
setting that changes its bytes is equal. vLLM's own block hashes cover the tokens, LoRA, multimodal inputs and `cache_salt`; model,
weights, dtype, RoPE, cache layout, block size, tensor-parallel rank and hash algorithm are covered here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attnstore.core.hashing import BlockHash, Namespace, block_hash, namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument

SHARED_HASH_ALGORITHMS: Final = ("sha256", "sha256_cbor")
"""vLLM's hash algorithms that give equal hashes in every process."""
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES: Final = 1 << 20


def page_layout(*, layers: int, layer_block_bytes: int, kv_heads: int, block_tokens: int, tp_rank: int, tp_size: int) -> PageLayout:
    """The layout of a vLLM page: for each layer in order the block as it lies in vLLM's cache, `layer_block_bytes` long.

    The order inside a block is vLLM's own, hence dtype OPAQUE; `head_dim` counts bytes. Raises `InvalidArgument` for a block
    that K and V of all heads and tokens do not share equally.
    """
    head_bytes, rest = divmod(layer_block_bytes, 2 * kv_heads * block_tokens)
    if rest:
        raise InvalidArgument(f"a block of {layer_block_bytes} bytes is not K and V of {kv_heads} heads and {block_tokens} tokens")
    return PageLayout(layers, kv_heads, head_bytes, block_tokens, DType.OPAQUE, tp_rank, tp_size)


def vllm_namespace(layout: PageLayout, settings: Mapping[str, Any], *, tenant_salt: str) -> Namespace:
    """The namespace of everything that `settings` (JSON values) and `layout` describe."""
    described = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return namespace(layout, model=b"vllm\0" + described.encode(), tenant_salt=tenant_salt.encode())


def weights_fingerprint(model: str) -> str:
    """What tells one set of weights from another: of a folder or file the name, size and both ends of each weight file.

    A name on a hub stands for itself: its revision belongs to the settings. Weights that differ only in the middle of files of
    equal size and equal ends are told apart by `model_id` of the connector's configuration alone.
    """
    path = Path(model)
    if not path.exists():
        return model
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    digest = hashlib.blake2b(digest_size=32)
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}\0{size_bytes}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE_BYTES))
            content.seek(max(0, size_bytes - _SAMPLE_BYTES))
            digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def page_hashes(parent: bytes, block_hashes: Sequence[bytes]) -> list[BlockHash]:
    """The store's names of the blocks that follow `parent` (the namespace before a request's first), from vLLM's hashes of them."""
    hashes: list[BlockHash] = []
    for foreign in block_hashes:
        parent = block_hash(parent, (), (bytes(foreign),))
        hashes.append(BlockHash(parent))
    return hashes
