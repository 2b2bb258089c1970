"""The names of vLLM's blocks in the store.

Owns: the layout, the namespace and the hashes of vLLM's pages. Invariant: two vLLM processes share a page only where every setting
that changes its bytes is equal. vLLM's own block hashes cover the tokens and `cache_salt`. The namespace covers the model's weights
and configuration, the longest sequence, dtypes, the memory order and size of a block, the scales of a quantized cache, the shard of
a tensor-parallel rank and the hash algorithm. `supported` refuses other settings that change the bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attnstore.core.hashing import BlockHash, Namespace, keyed_hashes, namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore_worker.file_digests import cache_dir, files_digest
from attnstore_worker.fingerprint import config_fields, fingerprint

NAMES_VERSION: Final = 2
"""Part of every namespace. To be raised by a change of a page's bytes, or of what a hash or a setting means: connectors of both
versions may then use one store.
"""
SHARED_HASH_ALGORITHMS: Final = ("sha256", "sha256_cbor")
"""vLLM's hash algorithms that give equal hashes in every process."""
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_BESIDE_WEIGHTS: Final = ("*.py", "*quant*.json")
"""Other files of a folder that change KV bytes and are not in vLLM's configuration: the model's own code, and the settings of a
quantization.
"""
_SAME_BYTES: Final = frozenset({"LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"})
"""Memory orders of the same dimensions. A page does not depend on them."""
_SYNONYMS: Final = {"fp8": "fp8_e4m3"}
_RESTART: Final = "start it again"


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the KV cache that a tensor-parallel rank holds: `index` of `count`. Of ranks with the same part, the first
    `writes` its pages, and the others only read them. With MLA every rank holds the same latents, so `count` is 1.
    """

    index: int
    count: int
    writes: bool


def shard_of(rank: int, *, tp_size: int, replicas: int) -> Shard:
    """Returns the shard of a rank. replicas: how many consecutive ranks hold the same, which divides `tp_size`; 1 for none."""
    if replicas < 1 or tp_size % replicas:
        raise InvalidArgument(f"{replicas} ranks cannot hold the same of {tp_size}")
    return Shard(rank // replicas, tp_size // replicas, rank % replicas == 0)


def page_layout(*, layers: int, layer_block_bytes: int, kv_heads: int, block_tokens: int, tp_rank: int, tp_size: int) -> PageLayout:
    """The layout of a vLLM page: for each layer in order the block as it lies in vLLM's cache, `layer_block_bytes` long.

    The order inside a block is vLLM's own, hence dtype OPAQUE; `head_dim` counts bytes of a key or a value, or half of a latent.
    tp_rank, tp_size: index and count of the rank's `Shard`. Raises `InvalidArgument` for a block that all heads and tokens do not
    share equally.
    """
    head_bytes, rest = divmod(layer_block_bytes, 2 * kv_heads * block_tokens)
    if rest:
        raise InvalidArgument(f"a block of {layer_block_bytes} bytes is not K and V of {kv_heads} heads and {block_tokens} tokens")
    return PageLayout(layers, kv_heads, head_bytes, block_tokens, DType.OPAQUE, tp_rank, tp_size)


def vllm_namespace(layout: PageLayout, settings: Mapping[str, Any], *, tenant_salt: str) -> Namespace:
    """The namespace of everything that `settings` (JSON values) and `layout` describe."""
    model = b"vllm\0" + fingerprint(names_version=NAMES_VERSION, **settings)
    return namespace(layout, model=model, tenant_salt=tenant_salt.encode())


def kv_settings(vllm_config: Any, kv_cache_config: Any, *, model_id: str | None, loaded_since_s: float) -> dict[str, Any]:
    """The settings of vLLM that change the bytes of a block and are in neither the page's layout, `group_settings` nor
    `block_order`.

    `model_id` replaces the weights' name, and the choice among their files. Overrides of the model's configuration are part of that
    configuration. Raises as `weights_name` does.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    layout = str(kv_cache_config.kv_cache_layout)
    weights: str | list[Any]
    if model_id is not None:
        weights = model_id
    else:
        name = weights_name(model.model, model.revision, load.download_dir, loaded_since_s=loaded_since_s)
        weights = [name, str(load.load_format), load.ignore_patterns]
    return {
        "model": weights,
        "config": config_fields(model.hf_config),
        # Some models compute differently if longer sequences are allowed: long-rope takes its long factors, Llama 4 scales.
        "tokens_max": model.max_model_len,
        "dtype": str(model.dtype),
        "quantization": [str(model.quantization), repr(model.quantization_config)],
        "cache_layout": None if layout in _SAME_BYTES else layout,
        "hash_algorithm": vllm_config.cache_config.prefix_caching_hash_algo,
    }


def group_settings(specs: Mapping[str, Any], groups: int, shards: int) -> dict[str, Any]:
    """The settings of one of `groups` KV cache groups. specs: vLLM's specification of each of its layers, in order, with one of
    `shards` parts of the heads. Engines of other tensor-parallel sizes have the same.
    """
    kinds = [_spec_fields(spec, shards) for spec in specs.values()]
    same = all(kind == kinds[0] for kind in kinds)
    return {"kv_spec": kinds[0] if same else kinds, "layers": list(specs) if groups > 1 else None}


def block_order(layers: Mapping[str, Any], platform: str) -> str:
    """Returns what only a worker process knows of the bytes in a block: the order that each attention backend chooses (on a CPU it
    packs keys for the CPU's instructions), and format and scales of a quantized cache.

    layers: vLLM's attention layers by name, in the order of the page, after their weights were loaded. platform: what else decides
    it. Raises `InvalidArgument` for a layer that does not report these, or whose scales are not one for K and one for V.
    """
    told = {platform}
    scales: list[list[Any]] = []
    for name, layer in layers.items():
        backend, packing = layer.get_attn_backend().get_name(), getattr(layer, "isa", None)
        if backend == "CPU_ATTN" and packing is None:
            raise InvalidArgument(f"vLLM's layer {name} does not report the instructions for which its keys are packed")
        told.add(f"{backend}/{packing}")
        if (cache_dtype := str(getattr(layer, "kv_cache_dtype", None))).startswith("fp8"):  # a state has none
            scales.append([_SYNONYMS.get(cache_dtype, cache_dtype), *_scales(name, layer)])
    if scales:
        told.add(f"scales={fingerprint(scales=scales).hex()}")
    return " ".join(sorted(told))


def weights_name(model: str, revision: str | None, download_dir: str | None = None, *, loaded_since_s: float) -> str:
    """The name of the weights: `org/name@commit` for a model of a hub, given by name or as the folder of a snapshot; for any other
    folder or file a digest of the files, wherever they lie.

    loaded_since_s: the time (UNIX) since when the weights may have been read, the start of the process. Raises `InvalidArgument`
    for weights that may have changed since then, and for a name whose commit is not in the hub's cache (`download_dir`, by default
    that of the environment); `ModelUnavailable` for files that cannot be read.
    """
    path = Path(model)
    if not path.exists():
        return f"{model}@{_commit(model, revision, download_dir, loaded_since_s)}"
    folder = path.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return _digest_weights(path, loaded_since_s)


def page_hashes(parent: bytes, block_hashes: Sequence[bytes]) -> list[BlockHash]:
    """The store's names of the blocks that follow `parent` (the namespace before a request's first), from vLLM's hashes of them."""
    return keyed_hashes(parent, block_hashes)


def _spec_fields(spec: Any, shards: int) -> dict[str, str]:
    """The fields of the specification of vLLM's cache, with the heads of all shards. Those that are None or False, as they are by
    default, are left out: a new version of vLLM with a new optional field keeps the names. Padding is no part of a page.
    """
    values = {each.name: (getattr(spec, each.name), each.default) for each in dataclasses.fields(spec)}
    values.pop("page_size_padded", None)
    told = {name: str(value) for name, (value, default) in values.items() if value is not default or not _is_off(value)}
    if "num_kv_heads" in told:
        told["num_kv_heads"] = str(spec.num_kv_heads * shards)
    return {"kind": type(spec).__name__, **told}


def _is_off(value: Any) -> bool:
    return value is None or value is False


def _scales(name: str, layer: Any) -> list[float]:
    scales = [getattr(layer, scale, None) for scale in ("_k_scale", "_v_scale")]
    if any(scale is None or scale.numel() != 1 for scale in scales):
        raise InvalidArgument(
            f"vLLM's layer {name} has a quantized cache without one scale for K and one for V: only those are named"
        )
    return [float(scale) for scale in scales if scale is not None]


def _commit(model: str, revision: str | None, download_dir: str | None, loaded_since_s: float) -> str:
    from huggingface_hub import constants  # vLLM's package, not this one's

    folder = Path(download_dir or constants.HF_HUB_CACHE) / ("models--" + model.replace("/", "--"))
    named, snapshots = folder / "refs" / (revision or "main"), folder / "snapshots"
    if os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() not in ("1", "true"):  # this cache is another hub's
        if named.is_file():
            if named.stat().st_ctime >= loaded_since_s and len(list(snapshots.iterdir())) > 1:
                raise InvalidArgument(
                    f"{model} was updated while vLLM started, so it is not known which commit it loaded: {_RESTART}"
                )
            return named.read_text().strip()
        if revision is not None and (snapshots / revision).is_dir():
            return revision
    raise InvalidArgument(f"the commit of {model} is not known, so its pages have no name: set model_id to a name of your own")


def _digest_weights(path: Path, loaded_since_s: float) -> str:
    files = [path]
    if path.is_dir():
        weights = [file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES]
        if not weights:
            raise InvalidArgument(f"{path} has no weights ({', '.join(_WEIGHT_SUFFIXES)}), so its pages have no name: set model_id")
        files = sorted({*weights, *(file for pattern in _BESIDE_WEIGHTS for file in path.glob(pattern))})
    digest = files_digest(files, cache_dir())
    changed = [file.name for file in files if file.stat().st_ctime >= loaded_since_s]
    if changed:
        raise InvalidArgument(f"{', '.join(changed)} in {path} changed while vLLM started, perhaps after it was loaded: {_RESTART}")
    return digest.hex()
