"""Models of several kinds of caches in the real vLLM: seeded random weights, tokens equal to those of vLLM alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import attnstore
from attnstore.testing import StoreProcess
from experiments.vllm.runs import Engine
from experiments.vllm.session import Batch, Start, attnstore_connector

PYTHON = os.environ.get("ATTNSTORE_VLLM_PYTHON")
VOCABULARY = 2_048
NEW_TOKENS = 16
PATIENCE_S = 60
"""A link whose first measurements differ much is not relied on; every ten seconds it is measured again, which reads a page too."""
WINDOW = 200
LONG = [index * 7_919 % 2_000 for index in range(1_100)]
PROMPTS = [LONG[:1_025], LONG, LONG[:700], [*LONG[:600], *range(100, 400)]]
"""Longer than the window; the first is eight blocks and a token, and the others share a part of it."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1_800),
    pytest.mark.skipif(PYTHON is None, reason="ATTNSTORE_VLLM_PYTHON names no Python with vLLM (make test-vllm makes one)"),
]


COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2_048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def gemma3() -> Any:
    """Five layers with a sliding window for each with full attention."""
    config = transformers.Gemma3TextConfig(
        **COMMON,
        num_hidden_layers=7,
        head_dim=64,
        sliding_window=WINDOW,
        layer_types=[*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def deepseek_v2() -> Any:
    """Multi-head latent attention, the first layer dense and the second with experts."""
    config = transformers.DeepseekV2Config(
        **{**COMMON, "num_key_value_heads": 4, "initializer_range": 0.05},  # with larger ones vLLM's prefill and decode differ
        num_hidden_layers=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return transformers.DeepseekV2ForCausalLM(config)


def lfm2() -> Any:
    """Short convolutions, whose state is the last tokens, and full attention."""
    config = transformers.Lfm2Config(
        **{**COMMON, "hidden_size": 512, "intermediate_size": 8_192, "num_key_value_heads": 1},  # slow to compute, fast to load
        num_hidden_layers=12,
        layer_types=["conv", "full_attention"] * 6,
        tie_word_embeddings=True,
        conv_dim=512,
        block_dim=512,
    )
    return transformers.Lfm2ForCausalLM(config)


def qwen3_next() -> Any:
    """Linear attention with a state, and full attention."""
    config = transformers.Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=4,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_only_layers=[0, 1, 2],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return transformers.Qwen3NextForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "sliding windows": gemma3,
    "latents": deepseek_v2,
    "short convolutions": lfm2,
    "linear attention": qwen3_next,
}


_FULL = 1_024 * 2 * 2 * 64 * 4
"""Bytes of a layer's 1,024 tokens, with K and V of two heads of 64 float32 each."""
LOADED = {
    "sliding windows": _FULL + 6 * _FULL // 4,
    "latents": 2 * 1_024 * 576 * 4,
    "short convolutions": 6 * (_FULL + 2 * 512 * 4),
    "linear attention": 1_132_544,
}
"""Bytes of each kind that the first prompt takes: of windows the last two blocks, of convolutions two tokens, of linear attention
one state for each of three layers.
"""
DTYPES = {"linear attention": "bfloat16"}
"""vLLM's kernels for a processor compute it in no other. Others are float32."""


@contextmanager
def vllm(model: Path, dtype: str, store: str | None) -> Iterator[Callable[[list[int]], list[int]]]:
    """Yields what asks an engine for the tokens that follow a prompt."""
    assert PYTHON is not None
    connector = None if store is None else attnstore_connector(store=store)
    start = Start(
        str(model),
        dtype,
        2_048,
        connector,
        options={"enforce_eager": True, "skip_tokenizer_init": True, "enable_prefix_caching": True},
    )
    with tempfile.TemporaryFile("w+") as log:
        try:
            with Engine(Path(PYTHON), start, os.cpu_count() or 1, log) as engine:
                yield lambda prompt: engine.ask(Batch([prompt], NEW_TOKENS)).tokens[0]
        finally:
            log.seek(0)
            print(log.read()[-8_000:])


@pytest.mark.parametrize("kind", MODELS)
def test_another_process_loads_what_the_model_needs_and_its_tokens_are_those_of_vllm_alone(kind: str, tmp_path: Path) -> None:
    dtype = DTYPES.get(kind, "float32")
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path)
    with vllm(tmp_path, dtype, None) as ask:
        alone = [ask(prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, alone))) > len(PROMPTS) / 2, "the model tells the prompts apart"
    with StoreProcess("--capacity", "256MiB") as node, attnstore.connect(node.url) as client:
        with vllm(tmp_path, dtype, node.url) as ask:
            assert [ask(prompt) for prompt in PROMPTS] == alone
        with vllm(tmp_path, dtype, node.url) as ask:
            loaded: list[int] = []
            give_up_s = time.monotonic() + PATIENCE_S
            while LOADED[kind] not in loaded and time.monotonic() < give_up_s:
                before = client.stats().read_bytes
                assert ask(PROMPTS[0]) == alone[0]
                loaded.append(client.stats().read_bytes - before)
            for prompt, tokens in zip(PROMPTS[1:], alone[1:], strict=True):
                assert ask(prompt) == tokens
    assert loaded[-1] == LOADED[kind], f"of windows and states only what the next token needs: {loaded}"
