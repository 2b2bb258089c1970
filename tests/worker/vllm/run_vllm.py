"""Runs under a Python that has vLLM: prompts in, tokens out. One JSON object on standard input, one on the last line of output.

Input: `{"model", "dtype", "store", "prompts", "max_tokens", "salts"}`; `store` is null for vLLM alone, a prompt is token ids.
Output: `{"tokens": [[...]], "ttft_ms": [...]}`. Before the prompts a short one pays for first uses.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """See the module."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    options: dict[str, Any] = {}
    if asked["store"] is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "AttnStoreConnector",
            "kv_connector_module_path": "worker.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": asked["store"],
        }
    engine = LLM(model=asked["model"], dtype=asked["dtype"], max_model_len=4096, disable_log_stats=True, **options)

    def generate(prompt: list[int], max_tokens: int, salt: str | None) -> list[int]:
        given: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            given["cache_salt"] = salt
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return list(engine.generate(given, sampling, use_tqdm=False)[0].outputs[0].token_ids)

    generate(list(range(1000, 1200)), 2, None)
    ttft_ms, tokens = [], []
    for prompt, salt in zip(asked["prompts"], asked["salts"], strict=True):
        began = time.perf_counter()
        generate(prompt, 1, salt)
        ttft_ms.append((time.perf_counter() - began) * 1000)
        engine.reset_prefix_cache()  # so that the second turn, too, asks the store
        tokens.append(generate(prompt, asked["max_tokens"], salt))
        engine.reset_prefix_cache()
    # The engine's processes write what waits to be written before they end.
    engine.llm_engine.engine_core.shutdown()
    print(json.dumps({"tokens": tokens, "ttft_ms": ttft_ms}))


if __name__ == "__main__":
    main()
