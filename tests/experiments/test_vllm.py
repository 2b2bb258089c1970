"""The vLLM experiment: every engine gets the same requests, and one that does not start is reported. Real vLLM:
`make test-vllm`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.bandwidth.processes import ChildEnded
from experiments.vllm.__main__ import main
from experiments.vllm.lmcache import lmcache_server
from experiments.vllm.runs import System
from experiments.vllm.session import Answers, Batch, environment
from experiments.vllm.workloads import DOCUMENT_TOKENS, MultiTurn, SharedDocuments, Workload


def tokenize(text: str) -> list[int]:
    return [ord(character) for character in text]


class Asked:
    """An engine that answers with the number of the request."""

    def __init__(self, first: int = 0) -> None:
        self.batches: list[Batch] = []
        self._next = first

    def __call__(self, batch: Batch) -> Answers:
        self.batches.append(batch)
        numbers = list(range(self._next, self._next + len(batch.prompts)))
        self._next += len(numbers)
        return Answers([[number] * batch.new_tokens for number in numbers], [float(number + 1) for number in numbers], 10.0)


def test_each_question_follows_its_whole_document_and_no_document_has_a_block_of_another() -> None:
    workload, asked = SharedDocuments(tokenize, documents=3, questions=2), Asked()
    workload.fill(asked)
    documents = [batch.prompts[0] for batch in asked.batches]
    assert [len(document) for document in documents] == [DOCUMENT_TOKENS] * 3
    assert len({tuple(document[:128]) for document in documents}) == 3
    played = workload.play(asked, None)
    prompts = [prompt for batch in asked.batches[3:] for prompt in batch.prompts]
    assert [prompt[:DOCUMENT_TOKENS] for prompt in prompts] == [document for document in documents for _ in range(2)]
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == len(played.ttft_ms) == 6
    assert played.wall_ms == 60.0


def test_conversations_go_on_with_the_answers_of_vllm_alone() -> None:
    workload = MultiTurn(tokenize, conversations=2, turns=3)
    alone, other = Asked(), Asked(first=1_000)
    played = workload.play(alone, None)
    workload.play(other, played.tokens)
    assert [batch.prompts for batch in other.batches] == [batch.prompts for batch in alone.batches]
    first, second, _ = (batch.prompts for batch in alone.batches)
    for before, after, answer in zip(first, second, played.tokens[:2], strict=True):
        assert after[: len(before) + len(answer)] == before + answer
    assert len({tuple(prompt) for batch in alone.batches for prompt in batch.prompts}) == 6


@pytest.mark.parametrize("create", [lambda: SharedDocuments(tokenize, 1, 1), lambda: MultiTurn(tokenize, 1, 1)])
def test_every_batch_is_asked_of_an_engine_that_has_forgotten(create: object) -> None:
    assert callable(create)
    workload: Workload = create()
    asked = Asked()
    workload.play(asked, None)
    assert all(batch.forget for batch in asked.batches)


def test_systems_have_names_that_tell_them_apart() -> None:
    systems = [System(), System("tcp"), System("tcp", "1g"), System("grpc", "1g"), System(peer="lmcache")]
    assert len({system.name for system in systems}) == len(systems)


def test_vllm_runs_on_the_same_cores_with_a_connector_and_without() -> None:
    core = min(os.sched_getaffinity(0))
    told = environment({"A": "1"}, 1)
    assert told["A"] == told["OMP_NUM_THREADS"] == "1"
    assert told["VLLM_CPU_OMP_THREADS_BIND"] == str(core)
    assert environment({"A": "1"}, 3)["OMP_NUM_THREADS"] == "3"


def test_an_lmcache_that_does_not_start_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "lmcache").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "lmcache").chmod(0o755)
    with (
        (tmp_path / "log").open("w+") as log,
        pytest.raises(ChildEnded, match="lmcache server"),
        lmcache_server(tmp_path / "python", log),
    ):
        pytest.fail("there is no server")


def test_an_interpreter_without_vllm_is_told_of(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--vllm-python", "/bin/false", "--model", str(tiny_folder), "--quick"]) == 2
    assert "ended early" in capfd.readouterr().err
