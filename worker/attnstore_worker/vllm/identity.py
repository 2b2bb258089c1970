"""The names of vLLM's blocks in the store.

Owns: the layout, the namespace and the hashes of vLLM's pages. Invariant: two vLLM processes share a page only where every setting
that changes its bytes is equal. vLLM's own block hashes cover the tokens and `cache_salt`. The namespace covers the model's weights
and configuration, the longest sequence, dtypes, the memory order and size of a block, the tensor-parallel rank and the hash
algorithm. `supported` refuses other settings that change the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attnstore.core.hashing import BlockHash, Namespace, block_hash, namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore_worker.fingerprint import config_fields, fingerprint

SHARED_HASH_ALGORITHMS: Final = ("sha256", "sha256_cbor")
"""vLLM's hash algorithms that give equal hashes in every process."""
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES: Final = 1 << 20
_CONFIG_NAMES: Final = ("config.json", "params.json")
"""vLLM has read one of them before there is a connector, so it is in the hub's cache."""


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
    return namespace(layout, model=b"vllm\0" + fingerprint(**settings), tenant_salt=tenant_salt.encode())


def kv_settings(vllm_config: Any, kv_cache_config: Any, *, model_id: str | None) -> dict[str, Any]:
    """The settings of vLLM that change the bytes of a block and are not in the page's layout. `model_id` replaces the name of the
    weights. Overrides of the model's configuration are part of that configuration. Raises `InvalidArgument` as `weights_name` does.
    """
    model = vllm_config.model_config
    return {
        "model": model_id or weights_name(model.model, model.revision),
        "config": config_fields(model.hf_config),
        # Some models compute differently if longer sequences are allowed: long-rope takes its long factors, Llama 4 scales.
        "tokens_max": model.max_model_len,
        "dtype": str(model.dtype),
        "quantization": [str(model.quantization), repr(model.quantization_config)],
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "cache_layout": str(kv_cache_config.kv_cache_layout),
        "kv_spec": repr(kv_cache_config.kv_cache_groups[0].kv_cache_spec),
        "hash_algorithm": vllm_config.cache_config.prefix_caching_hash_algo,
    }


def weights_name(model: str, revision: str | None) -> str:
    """The name of the weights: `org/name@commit` for a model of a hub, given by name or as the folder of a snapshot; for any other
    folder or file a digest of each weight file's name, size and both ends.

    Files of equal size that differ only in the middle have equal names: set `model_id` of the connector's configuration for those.
    Raises `InvalidArgument` for a name whose commit is not in the hub's cache.
    """
    path = Path(model)
    if not path.exists():
        return f"{model}@{_commit(model, revision)}"
    folder = path.absolute()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return _digest_weights(path)


def _commit(model: str, revision: str | None) -> str:
    from huggingface_hub import try_to_load_from_cache  # vLLM's package, not this one's

    for name in _CONFIG_NAMES:
        try:
            found = try_to_load_from_cache(model, name, revision=revision)
        except ValueError:  # no name that a hub knows
            break
        if isinstance(found, str):
            return Path(found).parent.name
    raise InvalidArgument(f"the commit of {model} is not known, so its pages have no name: set model_id to a name of your own")


def _digest_weights(path: Path) -> str:
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
