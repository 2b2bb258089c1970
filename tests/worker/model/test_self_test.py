"""Models are computed as by their own code, or refused by name at load."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnstore.attention import CheckedAttention
from attnstore.attention.cpu import DECODE_ROWS_MAX
from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, SamplingParams
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.attention import PagedStep, paged_attention_forward
from attnstore_worker.model.few_rows import FewRows
from attnstore_worker.model.llama import LlamaDecoder
from attnstore_worker.model.self_test import MANY_ROWS, AttentionKind
from attnstore_worker.testing import MemoryStore

CONTEXT_TOKENS = 256
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.2,
    "pad_token_id": None,
}

Saved = Callable[..., Path]


@pytest.fixture
def saved(tiny_folder: Path, tmp_path: Path) -> Saved:
    """Writes a random model of an architecture, tokenizer included; returns its folder."""

    def save(architecture: str, **fields: Any) -> Path:
        kind = getattr(transformers, f"{architecture}ForCausalLM")
        torch.manual_seed(3)
        module = kind(kind.config_class(**{**SIZES, **fields}))
        for parameter in module.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0, 0.2)
        module.save_pretrained(str(tmp_path))
        transformers.AutoTokenizer.from_pretrained(str(tiny_folder)).save_pretrained(str(tmp_path))
        return tmp_path

    return save


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, SIZES["vocab_size"]) for _ in range(tokens)]


def engine_logits(model: LoadedModel, token_ids: list[int], tokens: int, chunk_tokens: int) -> tuple[Tensor, list[int]]:
    """Logits of `tokens` generated tokens, and the sequence that they belong to."""
    options = EngineOptions(pool_bytes=32 * model.layout(16).page_bytes, chunk_tokens=chunk_tokens)
    with Engine(model, options) as engine:
        sequence = engine.submit(token_ids, SamplingParams(max_tokens=tokens, logits=True))
        logits: list[Tensor] = []
        while sequence.finish_reason is None:
            logits += [token.logits for token in engine.step() if token.logits is not None]
    return torch.stack(logits), sequence.token_ids[:-1]


def own_logits(model: LoadedModel, token_ids: list[int], tokens: int) -> Tensor:
    model.module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits: Tensor = model.module(torch.tensor([token_ids]), use_cache=False).logits[0, -tokens:]
            return logits
    finally:
        model.module.set_attn_implementation("attnstore_paged")


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "embedding_multiplier": 3.0}),
        ("NanoChat", {"final_logit_softcapping": 5.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.3}),
        ("Mistral", {"sliding_window": 24}),
        ("Gemma2", {"sliding_window": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0}),
        ("GptOss", {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("GraniteSWA", {"sliding_window": 24}),
        ("Gemma3", {"sliding_window": 24, "final_logit_softcapping": 6.0, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
@pytest.mark.parametrize("chunk_tokens", [16, 256])
def test_logits_are_scaled_and_capped_as_in_the_models_own_code(
    saved: Saved, architecture: str, fields: dict[str, Any], chunk_tokens: int
) -> None:
    model = load_model(saved(architecture, **fields))
    got, sequence = engine_logits(model, prompt(90), 4, chunk_tokens)
    torch.testing.assert_close(got, own_logits(model, sequence, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "fields", "why"),
    [
        ("Nemotron", {}, "NemotronAttention is not given the arguments"),
        ("Llama4", {}, "Llama4ForCausalLM has attn_temperature_tuning"),
        ("Llama4", {"attn_temperature_tuning": False, "attention_chunk_size": 128}, "a mask that is not its sliding window"),
        ("Gemma4", {}, "Gemma4ForCausalLM has no one page layout"),
        ("MiMoV2Flash", {}, r"MiMoV2FlashAttention has keys \(2, 32\) and values \(2, 128\)"),
        ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"]}, "GraniteMoeHybridForCausalLM"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM"),
        ("Doge", {}, "DogeForCausalLM cannot run on pages"),
    ],
)
def test_what_pages_cannot_give_is_refused_by_name(saved: Saved, architecture: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelUnavailable, match=why):
        load_model(saved(architecture, **fields))


@pytest.mark.parametrize(
    ("name", "argument", "why"),
    [
        ("position_bias", torch.ones(2, 2), "attends with position_bias"),
        ("indices", torch.ones(2, 2), "attends with indices"),
        ("is_causal", False, "attends with is_causal"),
        ("dropout", 0.1, "attends with dropout"),
        ("output_attentions", True, "attends with output_attentions"),
        ("paged", None, "not given the arguments"),
    ],
)
def test_an_argument_of_attention_that_is_not_implemented_is_refused_by_name(name: str, argument: object, why: str) -> None:
    tensor = torch.zeros(1, 2, 3, 4)
    arguments = {"scaling": 1.0, "paged": object(), name: argument}
    with pytest.raises(ModelUnavailable, match=f"Linear .*{why}|Linear is {why}"):
        paged_attention_forward(nn.Linear(1, 1), tensor, tensor, tensor, None, **arguments)  # type: ignore[arg-type]


def test_a_mask_of_its_own_is_refused() -> None:
    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelUnavailable, match="a mask of its own"):
        paged_attention_forward(nn.Linear(1, 1), tensor, tensor, tensor, torch.zeros(1), scaling=1.0, paged=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16, DType.FP16])
@pytest.mark.parametrize("way", ["few rows", "many rows", "a chunk's end", "the head"])
def test_a_step_that_computes_something_else_is_found(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType, way: str
) -> None:
    few, layer, logits, put = FewRows.logits, LlamaDecoder._run_layer, LlamaDecoder.logits, PagedStep._put
    if way == "few rows":
        monkeypatch.setattr(FewRows, "logits", lambda self, hidden, *rest: few(self, hidden * 0.5, *rest) + 1)
    elif way == "many rows":
        monkeypatch.setattr(LlamaDecoder, "_run_layer", lambda self, *arguments: layer(self, *arguments) * 1.5)
    elif way == "a chunk's end":
        monkeypatch.setattr(PagedStep, "_put", lambda self, index, rows: put(self, index, rows * (index == 0)))
    else:
        monkeypatch.setattr(LlamaDecoder, "logits", lambda self, *arguments: logits(self, *arguments) * 0.25)
    with pytest.raises(ModelUnavailable, match="LlamaForCausalLM on pages has other logits"):
        load_model(tiny_folder, dtype)


def test_a_model_with_no_numbers_in_its_type_is_refused(saved: Saved) -> None:
    with pytest.raises(ModelUnavailable, match="logits in fp16 that are no numbers"):
        load_model(saved("Granite", embedding_multiplier=1e6), DType.FP16)


def test_both_ways_through_a_llama_are_taken(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[int]] = {"few": [], "many": []}
    few, attend = FewRows.logits, CheckedAttention.paged_attention

    def few_rows(self: FewRows, embedded: Tensor, *rest: Any) -> Tensor:
        rows["few"].append(len(embedded))
        return few(self, embedded, *rest)

    def many_rows(self: CheckedAttention, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        rows["many"].append(len(query))
        return attend(self, query, *rest, **options)

    monkeypatch.setattr(FewRows, "logits", few_rows)
    monkeypatch.setattr(CheckedAttention, "paged_attention", many_rows)
    load_model(tiny_folder)
    assert rows["few"].count(1) == 3
    assert max(rows["few"]) > 1
    assert min(rows["many"]) > max(rows["few"])


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {**LONG, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("rope", ROPES)
def test_the_pages_of_a_prefix_are_the_same_under_any_length(
    saved: Saved, architecture: str, rope: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(saved(architecture, rope_parameters=ROPES[rope]))
    assert model.context_tokens_max == (64 if rope == "longrope" else CONTEXT_TOKENS)
    assert ("prompts are limited to 64 tokens" in caplog.text) == (rope == "longrope")
    stores = []
    for tokens in (33, model.context_tokens_max - 1):
        stores.append(MemoryStore())
        options = EngineOptions(pool_bytes=32 * model.layout(16).page_bytes, chunk_tokens=16)
        with Engine(model, options, store=stores[-1]) as engine:
            engine.generate(prompt(300)[:tokens], SamplingParams(max_tokens=1))
            assert engine.flush(30_000)
    short, long = (store.pages for store in stores)
    assert len(short) == 2
    for page_hash, page in short.items():
        assert bytes(long[page_hash]) == bytes(page)


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ({AttentionKind(0.5, None, 50.0, False)}, "soft_cap"),
        ({AttentionKind(0.5, None, None, True)}, "sinks"),
        ({AttentionKind(0.5, None, None, False), AttentionKind(0.5, 24, 50.0, False)}, "soft_cap"),
        ({AttentionKind(0.5, None, None, False), AttentionKind(0.25, None, None, False)}, "a scale for each layer"),
    ],
)
@pytest.mark.parametrize("attend", [AttendPolicy.ALWAYS, AttendPolicy.BEYOND_POOL])
def test_store_nodes_are_never_asked_for_what_they_do_not_compute(
    tiny: LoadedModel, store: MemoryStore, kinds: set[AttentionKind], why: str, attend: AttendPolicy
) -> None:
    model = replace(tiny, attention_kinds=frozenset(kinds))
    options = EngineOptions(pool_bytes=8 * model.layout(16).page_bytes, attend=attend)
    with pytest.raises(InvalidArgument, match=f"attends with {why}; store nodes"):
        Engine(model, options, store=store, attend_store=store)  # type: ignore[arg-type]


def test_what_layers_ask_of_attention_is_known_after_loading(saved: Saved, tiny: LoadedModel) -> None:
    assert tiny.attention_kinds == {AttentionKind(32**-0.5, None, None, False)}
    fields = {"sliding_window": 100, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
    model = load_model(saved("Gemma3", **fields))
    assert model.attention_kinds == {AttentionKind(0.25, 100, None, False), AttentionKind(0.25, None, None, False)}


def test_the_first_chunk_is_more_than_a_kernel_for_few_rows_takes() -> None:
    assert max(DECODE_ROWS_MAX.values()) <= MANY_ROWS
