"""Stock vLLM on an Attention store: a KV connector that vLLM loads by name.

    --kv-transfer-config '{"kv_connector": "AttnStoreConnector", "kv_connector_module_path": "attnstore_worker.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "grpc://127.0.0.1:7400"}}'

Only `connector` and `reporting` import vLLM, and they are imported when vLLM asks for the class, so that the rest can be tested
without it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "AttnStoreConnector":
        from attnstore_worker.vllm.connector import AttnStoreConnector

        return AttnStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
