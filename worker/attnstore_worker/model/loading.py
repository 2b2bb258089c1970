"""A model ready to run: transformers' modules with AttnStore's attention, its tokenizer and its identity.

Owns: `LoadedModel` and `load_model`. Invariant: everything that changes a KV byte is in `fingerprint` or in `layout`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import transformers

from attnstore.attention import AttentionBackend
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.attending.contexts import QueryShape
from attnstore_worker.device.base import Device
from attnstore_worker.device.host import HostDevice
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.errors import DeviceLost, ModelUnavailable, OutOfDeviceMemory
from attnstore_worker.file_digests import cache_dir
from attnstore_worker.fingerprint import config_fields, fingerprint
from attnstore_worker.model.attention import ATTENTION_NAME, register_attention
from attnstore_worker.model.checkpoint import read_module
from attnstore_worker.model.context import context_tokens_max
from attnstore_worker.model.conversion import converted_model
from attnstore_worker.model.decoder import Decoder, attention_on, create_decoder
from attnstore_worker.model.self_test import AttentionKind, SelfTest
from attnstore_worker.model_source import FolderSource, GgufSource, find_model, weights_digest

_TEST_BLOCK_TOKENS: Final = 16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model whose attention is `attnstore_worker.model.attention`.

    `module` is transformers' model in evaluation mode, and `decoder` runs it over pages. `fingerprint` is 32 bytes,
    `attention_kinds` lists what its layers request of attention, `context_tokens_max` is the longest prompt with its answer.
    """

    name: str
    module: Any
    decoder: Decoder
    tokenizer: Any
    dtype: DType
    fingerprint: bytes
    attention_kinds: frozenset[AttentionKind]
    context_tokens_max: int
    stop_token_ids: frozenset[int]

    def layout(self, block_tokens: int) -> PageLayout:
        """The page of `block_tokens` tokens of this model."""
        return _layout(self.module.config, self.dtype, block_tokens)

    def query_shape(self) -> QueryShape:
        """Returns the shape of queries to store nodes.

        Raises `InvalidArgument` for a model that does not attend with plain scores of one scale.
        """
        extras = {extra for kind in self.attention_kinds for extra in kind.extras()}
        scales = {kind.scale for kind in self.attention_kinds}
        refused = sorted(extras - {"sliding_window"})
        if refused or len(scales) > 1:
            wanted = ", ".join(refused) or "a scale for each layer"
            raise InvalidArgument(f"{self.name} attends with {wanted}; store nodes answer without: use attend='never'")
        [scale] = scales
        return QueryShape(self.module.config.num_attention_heads, float(scale), has_windows="sliding_window" in extras)


def load_model(
    path: Path | None = None, dtype: DType = DType.FP32, cache: Path | None = None, device: Device | None = None
) -> LoadedModel:
    """Loads the model at `path` (see `find_model`) with weights and KV in `dtype`; converted copies are stored in `cache`.

    The weights are read into the memory of `device` (default: the processor) one after the other, so that host memory holds only a
    few of them. Raises `ModelUnavailable` for missing, damaged or unsupported files, `OutOfDeviceMemory` for a model that is too
    large.
    """
    if dtype not in TORCH_DTYPES:
        raise ModelUnavailable(f"a model cannot run in dtype {dtype.value}; choose {', '.join(d.value for d in TORCH_DTYPES)}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    register_attention()
    device = device or HostDevice()
    attention = attention_on(device)  # first, because its packages may be missing, and reading weights takes long
    source = find_model(path)
    cache = cache or cache_dir()
    digest = weights_digest(source, cache)
    folder = converted_model(source, digest, cache) if isinstance(source, GgufSource) else source
    with device.submitting():
        module, tokenizer = _read_folder(folder, dtype, device)
        return ready_model(
            module,
            tokenizer,
            name=source.name,
            origin=str(source.path),
            dtype=dtype,
            weights=digest.hex(),
            attention=attention,
            device=device,
        )


def ready_model(
    module: Any,
    tokenizer: Any,
    *,
    name: str,
    origin: str,
    dtype: DType,
    weights: str,
    attention: AttentionBackend,
    device: Device,
) -> LoadedModel:
    """Returns a model after its self-test. module: transformers' causal language model on `device`, with the attention
    `ATTENTION_NAME`, which the model takes over. The calling thread is submitting to the device.

    weights: identifies the weights. origin: where the model comes from, for messages. Raises `ModelUnavailable` for an unsupported
    model.
    """
    layout = _supported_layout(origin, module, dtype)
    context_tokens = context_tokens_max(module.config)
    if context_tokens < module.config.max_position_embeddings:
        _logger.warning("%s: prompts are limited to %d tokens, where its long RoPE factors begin", origin, context_tokens)
    test = SelfTest(module, layout, context_tokens, f"{origin}: {type(module).__name__}", attention, device)
    decoder = create_decoder(module, device)
    attention_kinds = test.run(decoder)
    return LoadedModel(
        name=name,
        module=module,
        decoder=decoder,
        tokenizer=tokenizer,
        dtype=dtype,
        fingerprint=_fingerprint(weights, module.config, dtype),
        attention_kinds=attention_kinds,
        context_tokens_max=context_tokens,
        stop_token_ids=_stop_token_ids(module, tokenizer),
    )


def _read_folder(folder: FolderSource, dtype: DType, device: Device) -> tuple[Any, Any]:
    # Without it, weights are mapped from their files, which a CPU reads in place.
    place = {"device_map": {"": device.torch_device}} if device.uses_triton else {}
    try:
        with device.submitting():
            module = read_module(folder.path, dtype=TORCH_DTYPES[dtype], attn_implementation=ATTENTION_NAME, **place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
    except (ImportError, ModelUnavailable, OutOfDeviceMemory, DeviceLost):
        raise
    except Exception as error:  # damaged files raise whatever their parser runs into
        told = " ".join(str(error).split())
        raise ModelUnavailable(f"the model in {folder.path} cannot be loaded ({type(error).__name__}: {told})") from error
    return module.eval().requires_grad_(False), tokenizer


def _supported_layout(origin: str, module: Any, dtype: DType) -> PageLayout:
    """Returns the page layout of the self-test, for a Llama-type model: all layers have keys and values of one shape, and
    replaceable attention.
    """
    config = module.config
    needed = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "max_position_embeddings")
    missing = [name for name in needed if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ModelUnavailable(f"{origin} is not a Llama-type model: its config has no {', '.join(missing)}")
    if not getattr(module, "_supports_attention_backend", False):
        raise ModelUnavailable(f"{origin}: {type(module).__name__} does not let its attention be replaced")
    try:
        return _layout(config, dtype, _TEST_BLOCK_TOKENS)
    except Exception as error:  # configs that differ by layer raise errors of any kind
        raise ModelUnavailable(f"{origin}: {type(module).__name__} has no one page layout ({error})") from error


def _layout(config: Any, dtype: DType, block_tokens: int) -> PageLayout:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PageLayout(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )


def _fingerprint(weights: str, config: Any, dtype: DType) -> bytes:
    # No field of the config says which implementation of experts transformers has chosen; their results differ in rounding.
    experts = getattr(config, "_experts_implementation", None)
    return fingerprint(weights=weights, dtype=dtype.value, experts=experts, config=config_fields(config))


def _stop_token_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    ends = module.generation_config.eos_token_id
    ids = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)
