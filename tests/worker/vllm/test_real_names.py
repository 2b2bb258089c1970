"""The names of pages in the real vLLM, with a model of random weights that starts and computes fast."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnstore
from attnstore.testing import StoreProcess
from experiments.vllm.runs import Engine
from experiments.vllm.session import Batch, Start, attnstore_connector

PYTHON = os.environ.get("ATTNSTORE_VLLM_PYTHON")
PROMPT = [index * 7_919 % 2_000 for index in range(600)]
PAGES = len(PROMPT) // 256
PAGE_BYTES = 2 * 2 * 2 * 256 * 64 * 4
"""Two layers, K and V of two heads, 64 float32 each, of two blocks of 128 tokens."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1_800),
    pytest.mark.skipif(PYTHON is None, reason="ATTNSTORE_VLLM_PYTHON names no Python with vLLM (make test-vllm makes one)"),
]


def write_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2_048,
        max_position_embeddings=2_048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@contextmanager
def vllm(model: Path, store: str) -> Iterator[Callable[[], list[int]]]:
    """Yields what asks an engine for the tokens that follow the prompt."""
    assert PYTHON is not None
    start = Start(
        str(model),
        "float32",
        2_048,
        attnstore_connector(store=store),
        options={"enforce_eager": True, "skip_tokenizer_init": True},
    )
    with tempfile.TemporaryFile("w+") as log:
        try:
            with Engine(Path(PYTHON), start, os.cpu_count() or 1, log) as engine:
                yield lambda: engine.ask(Batch([PROMPT], 8)).tokens[0]
        finally:
            log.seek(0)
            print(log.read()[-6_000:])


def test_a_moved_folder_and_an_upgrade_keep_their_pages_and_changed_weights_have_their_own(tmp_path: Path) -> None:
    here, moved = tmp_path / "here", tmp_path / "moved" / "model"
    write_model(here, seed=0)
    with StoreProcess("--capacity", "256MiB") as node, attnstore.connect(node.url) as client:
        with vllm(here, node.url) as ask:
            tokens = ask()
        sealed, read = client.stats().pages_sealed, client.stats().read_bytes
        assert sealed >= PAGES

        shutil.move(here, moved)
        config = moved / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "99.0.0", "_name_or_path": "a/b"}))
        with vllm(moved, node.url) as ask:
            assert ask() == tokens
        assert client.stats().read_bytes - read >= PAGES * PAGE_BYTES, "every page came from the store"

        kept = client.stats().pages_sealed
        write_model(moved, seed=1)
        with vllm(moved, node.url) as ask:
            assert ask() != tokens
        assert client.stats().pages_sealed - kept >= PAGES, "no page of the old weights was a hit"


_SPECS = """
import torch
from fractions import Fraction
from types import SimpleNamespace
from vllm.v1.core.kv_cache_utils import kv_cache_groups_tp_replicas
from vllm.v1.kv_cache_interface import *
from attnstore.errors import InvalidArgument
from attnstore_worker.vllm.identity import shard_of
from attnstore_worker.vllm.supported import _refused_cache

full = dict(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
latent = dict(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, max_tp_shards=1)
mamba = dict(block_size=16, shapes=((2, 64),), dtypes=(torch.float32,))
specs = {
    "full": FullAttentionSpec(**full),
    "window_kept_as_full": FullAttentionSpec(**full, sliding_window=128),
    "fp8": FullAttentionSpec(**full, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),
    "mla": MLAAttentionSpec(**latent),
    "per_token_head": FullAttentionSpec(**full, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD),
    "packed_latents": MLAAttentionSpec(**latent, state_content_bytes=656),
    "indexer": MLAAttentionSpec(**latent, cache_role=SparseCacheRole.INDEXER),
    "window": SlidingWindowSpec(**full, sliding_window=128),
    "window_mla": SlidingWindowMLASpec(**latent, sliding_window=128),
    "cross": CrossAttentionSpec(**full),
    "padded_window": SlidingWindowSpec(**full, sliding_window=128, page_size_padded=16_384),
    "state": MambaSpec(**mamba, mamba_cache_mode="align"),
    "state_without_prefix_caching": MambaSpec(**mamba),
    "uniform": UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FullAttentionSpec(**full)}),
}
told = {}
for name, spec in specs.items():
    group = KVCacheGroupSpec(["a"], spec)
    refused = _refused_cache(KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[group], hash_block_size=16))
    replicas = kv_cache_groups_tp_replicas([group], 4)
    writers = [shard_of(rank, tp_size=4, replicas=replicas).writes for rank in range(4)]
    told[name] = [refused, writers.count(True)]
import json
print(json.dumps(told))
"""


def test_vllms_own_specifications_are_served_or_refused() -> None:
    assert PYTHON is not None
    run = subprocess.run([PYTHON, "-c", _SPECS], check=True, capture_output=True, text=True)
    told = json.loads(run.stdout.splitlines()[-1])
    served = {name: writers for name, (refused, writers) in told.items() if not refused}
    assert served == {
        "full": 4, "window_kept_as_full": 4, "fp8": 4, "mla": 1, "window": 4, "padded_window": 4, "state": 4, "uniform": 4,
    }, "with the ranks of four that write"  # fmt: skip
    assert "FP8_PER_TOKEN_HEAD" in told["per_token_head"][0][0]
    assert "mamba_cache_mode" in told["state_without_prefix_caching"][0][0]
