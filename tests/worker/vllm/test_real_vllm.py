"""The connector inside the real program. `make test-vllm` makes the environment; elsewhere ATTNSTORE_VLLM_PYTHON names one."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import attnstore
from attnstore.testing import StoreProcess
from worker.model.conversion import export_model

PYTHON = os.environ.get("ATTNSTORE_VLLM_PYTHON")
ROOT = Path(__file__).parents[3]
PROMPT_TOKENS = 1_776
_RUN_S_MAX = 420

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1_500),
    pytest.mark.skipif(PYTHON is None, reason="ATTNSTORE_VLLM_PYTHON names no Python with vLLM (make test-vllm makes one)"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    export_model(None, folder)
    return folder


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model).encode("\n".join(pydoc_data.topics.topics.values())[:60_000])
    return [ids[begin : begin + PROMPT_TOKENS] for begin in (0, 4_000)]


@pytest.fixture
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "1GiB") as node:
        yield node


def run(
    model: Path, store: dict[str, Any] | None, prompts: list[list[int]], salts: list[str | None] | None = None
) -> dict[str, Any]:
    asked = {
        "model": str(model),
        "dtype": "float32",
        "store": store,
        "prompts": prompts,
        "max_tokens": 24,
        "salts": salts or [None] * len(prompts),
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("run_vllm.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_RUN_S_MAX,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4_000:]
    print(child.stderr[-2_000:], file=sys.stderr)
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def test_a_second_process_gets_the_pages_and_the_tokens_are_those_of_vllm_alone(
    model: Path, prompts: list[list[int]], node: StoreProcess
) -> None:
    alone = run(model, None, prompts)
    first = run(model, {"store": node.url}, prompts)
    assert first["tokens"] == alone["tokens"]
    with attnstore.connect(node.url) as client:
        assert client.stats().pages_sealed >= 2 * (PROMPT_TOKENS // 128)
        read_before = client.stats().read_bytes
        second = run(model, {"store": node.url}, prompts)
        read = client.stats().read_bytes - read_before
    assert second["tokens"] == alone["tokens"]
    assert read >= 2 * (PROMPT_TOKENS // 128) * 5_898_240, "every page of both prompts came from the store"
    print({"ttft_ms": {"alone": alone["ttft_ms"], "first": first["ttft_ms"], "second": second["ttft_ms"]}})


def test_salts_separate_tenants_and_a_store_that_is_gone_costs_no_token(model: Path, prompts: list[list[int]]) -> None:
    with StoreProcess("--capacity", "1GiB") as node:
        with_salts = run(model, {"store": node.url}, [prompts[0], prompts[0]], ["alice", "bob"])
        assert with_salts["tokens"][0] == with_salts["tokens"][1]
        with attnstore.connect(node.url) as client:
            assert client.stats().pages_sealed >= 2 * (PROMPT_TOKENS // 128), "each salt has pages of its own"
        url = node.url
    without = run(model, {"store": url, "load_ms_max": 500, "lookup_ms_max": 200}, [prompts[0]])
    assert without["tokens"][0] == with_salts["tokens"][0]
