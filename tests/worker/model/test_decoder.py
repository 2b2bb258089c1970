"""Decoders: the logits of every decoder are those of transformers' own modules."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from attnstore.core.layout import DType
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.decoder import TransformersDecoder
from attnstore_worker.model.linear import PackedLinear, WidenedLinear, gated_product, has_bf16_kernels, merged_linear, pack_linears
from attnstore_worker.model.llama import LlamaDecoder

BF16_TOLERANCE = 2**-6
"""bf16 has 8 bits: one rounding is 2**-8 of the value, and consecutive layers add theirs."""


def linear(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).eval().requires_grad_(False)


def merged(parts: list[nn.Linear]) -> nn.Module:
    return merged_linear(torch.cat([part.weight for part in parts]), parts)


def engine_logits(model: LoadedModel, token_ids: list[int], tokens: int) -> torch.Tensor:
    """Logits of `tokens` generated tokens, computed with prefill in two chunks and then one by one."""
    with Engine(model, EngineOptions(pool_bytes=32 * model.layout(16).page_bytes, chunk_tokens=64)) as engine:
        sequence = engine.submit(token_ids, SamplingParams(max_tokens=tokens, logits=True))
        logits: list[torch.Tensor] = []
        while sequence.finish_reason is None:
            logits += [token.logits for token in engine.step() if token.logits is not None]
    return torch.stack(logits)


def expected_logits(model: LoadedModel, sequence: list[int], tokens: int) -> torch.Tensor:
    """Returns the same from transformers' modules and their own attention, in one pass."""
    model.module.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model.module(torch.tensor([sequence]), use_cache=False, logits_to_keep=tokens).logits[0]
            return logits.float()
    finally:
        model.module.set_attn_implementation("attnstore_paged")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_a_packed_layer_computes_what_the_layer_did(rows: int, bias: bool) -> None:
    if not has_bf16_kernels():
        pytest.skip("oneDNN has no bf16 kernels for this machine")
    dense = linear(96, 160, torch.bfloat16, bias=bias)
    packed = PackedLinear(dense.weight, dense.bias)
    given, factor = torch.randn(rows, 96).bfloat16(), torch.randn(rows, 160).bfloat16()
    tolerance = {"atol": BF16_TOLERANCE, "rtol": BF16_TOLERANCE}
    torch.testing.assert_close(packed(given), dense(given), **tolerance)
    torch.testing.assert_close(packed(given.unsqueeze(0)), dense(given).unsqueeze(0), **tolerance)
    torch.testing.assert_close(packed.silu(given), functional.silu(dense(given)), **tolerance)
    torch.testing.assert_close(packed.times(given, factor), dense(given) * factor, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 130])
def test_a_widened_layer_computes_what_the_layer_did(rows: int, bias: bool) -> None:
    dense = linear(96, 160, torch.bfloat16, bias=bias)
    given = torch.randn(rows, 96).bfloat16()
    got = WidenedLinear(dense.weight, dense.bias)(given)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, dense(given), atol=BF16_TOLERANCE, rtol=BF16_TOLERANCE)


def test_bf16_layers_become_those_that_this_machine_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.model.linear.has_bf16_kernels", lambda: False)
    module = nn.Sequential(linear(32, 32, torch.bfloat16, bias=True))
    pack_linears(module)
    assert type(module[0]) is WidenedLinear
    assert type(merged([linear(32, 32, torch.bfloat16, bias=False)])) is WidenedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_layer_gives_the_outputs_side_by_side(dtype: torch.dtype, bias: bool) -> None:
    parts = [linear(32, outputs, dtype, bias=bias, seed=outputs) for outputs in (48, 16, 16)]
    given = torch.randn(5, 32).to(dtype)
    expected = torch.cat([part(given) for part in parts], dim=-1)
    tolerance = BF16_TOLERANCE if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(merged(parts)(given), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(torch.cat([part(given) for part in parts], dim=-1), expected)


def test_a_models_fp32_weights_are_held_once(tiny: LoadedModel) -> None:
    decoder = tiny.decoder
    assert isinstance(decoder, LlamaDecoder)
    for layer, lean in zip(tiny.module.model.layers, decoder._layers, strict=True):
        together = lean.query_key_value.weight.untyped_storage().data_ptr()
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj, layer.input_layernorm, lean.gate):
            assert part.weight.untyped_storage().data_ptr() == together


def test_fp32_layers_are_not_packed() -> None:
    module = nn.Sequential(linear(32, 32, torch.float32, bias=True))
    pack_linears(module)
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_is_the_same_packed_or_not(dtype: torch.dtype) -> None:
    mlp = nn.ModuleDict({"gate": linear(32, 64, dtype, bias=False, seed=1), "up": linear(32, 64, dtype, bias=False, seed=2)})
    given = torch.randn(9, 32).to(dtype)
    expected = functional.silu(mlp["gate"](given)) * mlp["up"](given)
    pack_linears(mlp)
    tolerance = BF16_TOLERANCE if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(gated_product(mlp["gate"], mlp["up"], given), expected, atol=tolerance, rtol=tolerance)


def test_the_lean_decoder_has_the_logits_of_transformers_modules(tiny: LoadedModel) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    token_ids = [random.Random(4).randrange(3, 49_000) for _ in range(100)]
    got = engine_logits(tiny, token_ids, 12)
    sequence = [*token_ids, *(int(row.argmax()) for row in got[:-1])]
    torch.testing.assert_close(got, expected_logits(tiny, sequence, 12), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_with_biases_and_its_own_head_runs_lean(tiny_folder: Path, tmp_path: Path, tied: bool) -> None:
    config = transformers.AutoConfig.from_pretrained(str(tiny_folder))
    config.update({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied})
    model = random_model(transformers.LlamaForCausalLM(config), tiny_folder, tmp_path, DType.FP32)
    assert isinstance(model.decoder, LlamaDecoder)
    assert_same_as_transformers(model, 1e-4)


def test_another_llama_type_model_runs_on_transformers_modules(tiny_folder: Path, tmp_path: Path) -> None:
    fields = transformers.AutoConfig.from_pretrained(str(tiny_folder)).to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = transformers.Qwen2Config(**{name: fields[name] for name in names}, max_position_embeddings=512, initializer_range=0.2)
    model = random_model(transformers.Qwen2ForCausalLM(config), tiny_folder, tmp_path, DType.FP32)
    assert isinstance(model.decoder, TransformersDecoder)
    assert_same_as_transformers(model, 1e-4)


def test_bf16_logits_stay_near_those_of_fp32(tiny_folder: Path, tiny: LoadedModel) -> None:
    """As near as transformers' own bf16, on the same tokens."""
    model = load_model(tiny_folder, DType.BF16)
    token_ids = [random.Random(6).randrange(3, 49_000) for _ in range(100)]
    exact = expected_logits(tiny, token_ids, 1)
    error = (engine_logits(model, token_ids, 1) - exact).abs().mean()
    theirs = (expected_logits(model, token_ids, 1) - exact).abs().mean()
    assert error < 1.5 * theirs, f"{error:.2g} against {theirs:.2g}"


def random_model(module: transformers.PreTrainedModel, tokenizer: Path, folder: Path, dtype: DType) -> LoadedModel:
    """A model of random weights, biases included, saved and loaded like any other."""
    torch.manual_seed(11)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    module.save_pretrained(str(folder))
    transformers.AutoTokenizer.from_pretrained(str(tokenizer)).save_pretrained(str(folder))
    return load_model(folder, dtype)


def assert_same_as_transformers(model: LoadedModel, tolerance: float) -> None:
    token_ids = [random.Random(5).randrange(3, 49_000) for _ in range(100)]
    got = engine_logits(model, token_ids, 5)
    sequence = [*token_ids, *(int(row.argmax()) for row in got[:-1])]
    torch.testing.assert_close(got, expected_logits(model, sequence, 5), atol=tolerance, rtol=tolerance)
