"""Models of random weights in the shapes of real ones, without any file, for measurements and tests.

Owns: `random_model` and its shapes. Invariant: shape, dtype and seed determine the weights, bit for bit, on every device: they come
from integer arithmetic, not from a device's generator. Weights are made in the device's memory, so no host copy of them exists.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from attnstore.core.layout import DType
from attnstore_worker.device.base import Device
from attnstore_worker.device.host import HostDevice
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.model.attention import ATTENTION_NAME, register_attention
from attnstore_worker.model.decoder import attention_on
from attnstore_worker.model.loading import LoadedModel, ready_model

_FILL_ELEMENTS: Final = 1 << 24
"""Weights made at once, which bounds the memory for it to 400 MB."""

_WORD: Final = (1 << 32) - 1
_GOLDEN: Final = 0x9E3779B1
_LOGIT_DEVIATION: Final = 3.0
"""Standard deviation of logits: large enough that two tokens are rarely equally likely."""

_NORM_SPREAD: Final = 0.1


class LlamaShape(NamedTuple):
    """The sizes of a Llama, in elements. `tied`: the embedding is also the output layer."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int
    rope_theta: float
    tied: bool


SMOLLM2_135M: Final = LlamaShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, 8192, 100_000.0, tied=True)
LLAMA_3_8B: Final = LlamaShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 500_000.0, tied=False)


def random_model(shape: LlamaShape, dtype: DType, device: Device | None = None, seed: int = 0) -> LoadedModel:
    """Returns a model that has passed its self-test. Its tokenizer has one token for each byte; the other tokens are numbers.

    The weights are on `device` (default: the processor). Raises `ModelUnavailable` if the self-test fails, and `OutOfDeviceMemory`.
    """
    device = device or HostDevice()
    with device.submitting():
        module = empty_llama(shape, TORCH_DTYPES[dtype], device.torch_device)
        for number, (name, parameter) in enumerate(module.named_parameters()):
            fill_random(parameter.data, *_spread(shape, name), seed=seed, number=number)
        name = f"random-{shape.name}-{seed}"
        return ready_model(
            module,
            _tokenizer(shape.vocabulary),
            name=name,
            origin=name,
            dtype=dtype,
            weights=name,
            attention=attention_on(device),
            device=device,
        )


def fill_random(target: Tensor, mean: float, deviation: float, *, seed: int, number: int) -> None:
    """Fills contiguous memory with uniform random values. Equal arguments give equal values on every device.

    A value is a hash of its index under two keys, so that tensors of other numbers or seeds have unrelated values. Source of the
    hash: the finalizer of MurmurHash3.
    """
    assert target.is_contiguous()
    keys = [_hashed(torch.tensor([(seed * 2 + half) & _WORD])) for half in range(2)]
    first, second = (int(_hashed(key ^ number)) for key in keys)
    flat = target.view(-1)
    for begin in range(0, len(flat), _FILL_ELEMENTS):
        part = flat[begin : begin + _FILL_ELEMENTS]
        index = torch.arange(begin, begin + len(part), device=target.device)
        bits = _hashed(_hashed((index * _GOLDEN + first) & _WORD) ^ second) >> 8
        uniform = (bits.float() + (0.5 - (1 << 23))) / (1 << 23)
        part.copy_(uniform * (deviation * math.sqrt(3)) + mean)


def _hashed(words: Tensor) -> Tensor:
    """int64 tensors of 32-bit words; products wrap in 64 bits, of which the lower half is right."""
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & _WORD
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & _WORD
    return words ^ (words >> 16)


def _spread(shape: LlamaShape, name: str) -> tuple[float, float]:
    """Returns mean and standard deviation of a parameter: products keep the size of a row's elements."""
    if name.endswith("norm.weight"):
        return 1.0, _NORM_SPREAD
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and shape.tied):
        return 0.0, _LOGIT_DEVIATION / math.sqrt(shape.hidden)
    inputs = {"embed_tokens": 1, "o_proj": shape.q_heads * shape.head_dim, "down_proj": shape.intermediate}
    return 0.0, 1 / math.sqrt(inputs.get(name.split(".")[-2], shape.hidden))


def empty_llama(shape: LlamaShape, dtype: torch.dtype, place: torch.device) -> Any:
    """Returns transformers' `LlamaForCausalLM` with weights on a device that are not initialized."""
    register_attention()
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        attn_implementation=ATTENTION_NAME,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device("meta"):
        module: Any = transformers.LlamaForCausalLM(config)
    for name, parameter in list(module.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        memory = torch.empty(parameter.shape, dtype=dtype, device=place)
        setattr(module.get_submodule(owner), own_name, nn.Parameter(memory, requires_grad=False))
    module.tie_weights()
    module.model.rotary_emb = type(module.model.rotary_emb)(config).to(place)  # its buffers are computed, not filled
    return module.eval()


def _tokenizer(vocabulary: int) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"Ġ{number}" for number in range(vocabulary - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
