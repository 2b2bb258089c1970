"""The connector inside the real vLLM. `make test-vllm` creates the environment; otherwise ATTNSTORE_VLLM_PYTHON names one."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import attnstore
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from attnstore.testing.ports import free_port
from attnstore_worker.model.conversion import export_model
from experiments.vllm.runs import Engine
from experiments.vllm.session import Answers, Batch, Start, attnstore_connector
from tests.worker.vllm.judged import NAMED, NO_EFFECT, PASSED_BY, REFUSED

PYTHON = os.environ.get("ATTNSTORE_VLLM_PYTHON")
PROMPT_TOKENS = 1_776
BLOCKS = PROMPT_TOKENS // 128
PAGE_BYTES = 5_898_240
NEW_TOKENS = 24
LOAD_MS_MAX = 2_000
THREADS = os.cpu_count() or 1

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1_800),
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

    ids = AutoTokenizer.from_pretrained(model).encode("\n".join(pydoc_data.topics.topics.values())[:80_000])
    return [ids[begin : begin + PROMPT_TOKENS] for begin in range(0, 16_000, 2_000)]


@contextmanager
def vllm(model: Path, settings: dict[str, Any] | None, blocks: int | None = None) -> Iterator[Engine]:
    assert PYTHON is not None
    connector = None if settings is None else attnstore_connector(**settings)
    with tempfile.TemporaryFile("w+") as log:
        try:
            with Engine(Path(PYTHON), Start(str(model), "float32", 4_096, connector, blocks), THREADS, log) as engine:
                yield engine
        finally:
            log.seek(0)
            print(log.read()[-6_000:])


@pytest.fixture(scope="module")
def alone(model: Path, prompts: list[list[int]]) -> Answers:
    """vLLM without a store, one prompt after the other."""
    with vllm(model, None) as engine:
        each = [engine.ask(Batch([prompt], NEW_TOKENS)) for prompt in prompts]
    return Answers([one.tokens[0] for one in each], [one.ttft_ms[0] for one in each], sum(one.wall_ms for one in each))


_FIELDS = """
import dataclasses, json, vllm.config
from vllm.config.aux_output import AuxOutputConfig
parts = [AuxOutputConfig, *(getattr(vllm.config, name) for name in {names})]
print(json.dumps({{part.__name__: sorted(field.name for field in dataclasses.fields(part)) for part in parts}}))
"""


def test_every_field_of_vllms_configuration_was_judged() -> None:
    assert PYTHON is not None
    verdicts: dict[str, list[str]] = {}
    for judged in (NAMED, REFUSED, PASSED_BY, NO_EFFECT):
        for part, fields in judged.items():
            verdicts.setdefault(part, []).extend(fields.split())
    script = _FIELDS.format(names=[name for name in verdicts if name != "AuxOutputConfig"])
    told = json.loads(subprocess.run([PYTHON, "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert {part: sorted(fields) for part, fields in verdicts.items()} == told


def test_a_second_process_gets_the_pages_and_the_tokens_are_those_of_vllm_alone(
    model: Path, prompts: list[list[int]], alone: Answers
) -> None:
    with StoreProcess("--capacity", "1GiB") as node, attnstore.connect(node.url) as client:
        with vllm(model, {"store": node.url}) as first:
            for number in range(2):
                assert first.ask(Batch([prompts[number]], NEW_TOKENS)).tokens == [alone.tokens[number]]
        assert client.stats().pages_sealed >= 2 * BLOCKS
        read_before = client.stats().read_bytes
        with vllm(model, {"store": node.url}) as second:
            answers = [second.ask(Batch([prompts[number]], NEW_TOKENS)) for number in range(2)]
            together = second.ask(Batch(prompts[:2], NEW_TOKENS))
        read = client.stats().read_bytes - read_before
    assert [one.tokens[0] for one in answers] == alone.tokens[:2] == together.tokens
    assert read >= 2 * BLOCKS * PAGE_BYTES, "every page of both prompts came from the store"
    print({"ttft_ms": {"alone": alone.ttft_ms[:2], "second": [one.ttft_ms[0] for one in answers]}})


def test_every_hit_is_loaded_where_vllms_pool_is_full(model: Path, prompts: list[list[int]], alone: Answers) -> None:
    asked, tokens = prompts[:4], alone.tokens[:4]
    with StoreProcess("--capacity", "1GiB") as node, attnstore.connect(node.url) as client:
        with vllm(model, {"store": node.url}) as first:
            assert [first.ask(Batch([prompt], NEW_TOKENS)).tokens[0] for prompt in asked] == tokens
        read_before = client.stats().read_bytes
        with vllm(model, {"store": node.url}, blocks=34) as second:  # room for two prompts and their answers
            assert second.ask(Batch(asked, NEW_TOKENS)).tokens == tokens
        assert client.stats().read_bytes - read_before >= len(asked) * BLOCKS * PAGE_BYTES


def test_salts_separate_tenants(model: Path, prompts: list[list[int]], alone: Answers) -> None:
    with StoreProcess("--capacity", "1GiB") as node:
        with vllm(model, {"store": node.url}) as engine:
            for salt in ("alice", "bob"):
                assert engine.ask(Batch([prompts[0]], NEW_TOKENS, [salt])).tokens == [alone.tokens[0]]
        with attnstore.connect(node.url) as client:
            assert client.stats().pages_sealed >= 2 * BLOCKS, "each salt has pages of its own"


def test_faults_during_a_load_cost_time_and_no_token_and_no_engine(
    model: Path, prompts: list[list[int]], alone: Answers, tmp_path: Path
) -> None:
    arena = tmp_path / "arena"
    with ExitStack() as stack:
        options = ("--capacity", "1GiB", "--page-channel-port", str(free_port()))
        node = stack.enter_context(StoreProcess(*options, "--arena-path", str(arena)))
        link = stack.enter_context(Link.to_node(node.url, "1g"))
        client = attnstore.connect(node.url, transport="grpc")
        stack.callback(client.close)
        store = {"store": link.url, "transport": "tcp", "load_ms_max": LOAD_MS_MAX, "lookup_ms_max": LOAD_MS_MAX}
        engine = stack.enter_context(vllm(model, store))
        for prompt, tokens in zip(prompts, alone.tokens, strict=True):
            assert engine.ask(Batch([prompt], NEW_TOKENS)).tokens == [tokens]

        def asked(number: int, during: Callable[[], object] | None = None, after_s: float = 0.2) -> tuple[Answers, int]:
            """Returns a prompt whose pages the store has, and the bytes that were read of it; a load takes about 0.6 s."""
            read = client.stats().read_bytes
            timer = threading.Timer(after_s, during or (lambda: None))
            timer.start()
            answers = engine.ask(Batch([prompts[number]], NEW_TOKENS))
            timer.join()
            assert answers.tokens == [alone.tokens[number]]
            assert answers.ttft_ms[0] < 2 * LOAD_MS_MAX + 3 * max(alone.ttft_ms)
            return answers, 0 if node.process.poll() is not None else client.stats().read_bytes - read

        assert asked(0)[1] >= BLOCKS * PAGE_BYTES
        for fault in (link.stall, link.cut):
            asked(1, fault)
            link.restore()
            give_up_s = time.monotonic() + 60  # a link that was too slow is measured again after ten seconds
            while not asked(2)[1]:
                assert time.monotonic() < give_up_s, "the store is used again"
        with arena.open("r+b") as memory:  # every page now has a wrong byte
            for position in range(4_096, arena.stat().st_size, PAGE_BYTES // 4):
                memory.seek(position)
                byte = memory.read(1)
                memory.seek(position)
                memory.write(bytes([byte[0] ^ 0xFF]))
        asked(3)
        asked(4, node.kill)
        with StoreProcess("--listen", node.address, *options), attnstore.connect(node.url, transport="grpc") as again:
            assert engine.ask(Batch([prompts[5]], NEW_TOKENS)).tokens == [alone.tokens[5]]
            for number in (6, 7, 6, 7, 6, 7):
                assert engine.ask(Batch([prompts[number]], NEW_TOKENS)).tokens == [alone.tokens[number]]
            assert again.stats().read_bytes > 0, "the restarted store is written to and read from"
