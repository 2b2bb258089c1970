"""One vLLM engine in a process of its own, under the Python that has vLLM: requests in, tokens and times out, one JSON line each.

Owns: `Start`, `Batch` and `Answers`, which are sent over the pipe, and the loop that answers. Standard library only, apart from
vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_WARM_UP = list(range(1000, 1200))


@dataclass(frozen=True, slots=True)
class Start:
    """`model` is a Hugging Face folder, `dtype` vLLM's name of a type. `connector` is vLLM's `kv_transfer_config`; None for vLLM
    alone. `blocks` is the size of vLLM's cache; None for as many as fit. `options` are further arguments of vLLM's `LLM`.
    """

    model: str
    dtype: str
    tokens_max: int
    connector: dict[str, Any] | None = None
    blocks: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts of token ids that are submitted at once, each continued greedily by exactly `new_tokens`. `salts` as vLLM's
    `cache_salt`.

    With `forget`, vLLM's own prefix cache is emptied first, as if prompts of other users had replaced it.
    """

    prompts: list[list[int]]
    new_tokens: int
    salts: list[str | None] = field(default_factory=list)
    forget: bool = True


@dataclass(frozen=True, slots=True)
class Answers:
    """In the order of the prompts: the new tokens, and the times to the first of them; `wall_ms` is the time to the last token of
    all.
    """

    tokens: list[list[int]]
    ttft_ms: list[float]
    wall_ms: float


def environment(base: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns the environment of vLLM on a CPU: as many threads, no network, KV memory of 1 GiB.

    The cores are named, because by default vLLM leaves one of them unused without a connector and two with one, or none if that
    would be all: on two cores vLLM with any connector would be twice as fast as vLLM alone.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        **base,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }


def attnstore_connector(**settings: Any) -> dict[str, Any]:
    """Returns the `kv_transfer_config` of AttnStore's connector; `settings` are its own, including `store`."""
    return {
        "kv_connector": "AttnStoreConnector",
        "kv_connector_module_path": "attnstore_worker.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }


class Session:
    """vLLM's offline engine with its defaults, its engine core in a process of its own."""

    def __init__(self, start: Start) -> None:
        from vllm import LLM  # only the Python that runs this module has it

        options = dict(start.options)
        if start.connector is not None:
            options["kv_transfer_config"] = start.connector
        if start.blocks is not None:
            options["num_gpu_blocks_override"] = start.blocks
        self._llm = LLM(model=start.model, dtype=start.dtype, max_model_len=start.tokens_max, disable_log_stats=True, **options)
        self._requests = 0

    def answer(self, batch: Batch) -> Answers:
        """Runs a batch to its end."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        if batch.forget:
            self._llm.reset_prefix_cache()
        sampling = SamplingParams(max_tokens=batch.new_tokens, temperature=0, ignore_eos=True)
        order: dict[str, int] = {}
        tokens: list[list[int]] = [[] for _ in batch.prompts]
        ttft_ms = [0.0] * len(batch.prompts)
        began = time.perf_counter()
        for index, prompt in enumerate(batch.prompts):
            given: dict[str, Any] = {"prompt_token_ids": prompt}
            if batch.salts and batch.salts[index] is not None:
                given["cache_salt"] = batch.salts[index]
            self._requests += 1
            name = str(self._requests)
            engine.add_request(name, given, sampling)
            order[name] = index
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = order[output.request_id]
                tokens[index] = list(output.outputs[0].token_ids)
                if not ttft_ms[index] and tokens[index]:
                    ttft_ms[index] = (time.perf_counter() - began) * 1e3
        return Answers(tokens, ttft_ms, (time.perf_counter() - began) * 1e3)

    def close(self) -> None:
        """Ends the engine, which writes its pending pages first."""
        self._llm.llm_engine.engine_core.shutdown()


def main() -> None:
    """Prints `ready` and answers batches until standard input ends. vLLM's output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session(Start(**json.loads(sys.argv[1])))
    session.answer(Batch([_WARM_UP], 2))
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(asdict(session.answer(Batch(**json.loads(line))))), file=answers)
    session.close()


if __name__ == "__main__":
    main()
