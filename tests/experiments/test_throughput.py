"""The comparison with vLLM: the timing of the sides, and the side that can run here."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.throughput.__main__ import main
from experiments.throughput.compare import vllm_environment
from experiments.throughput.ours import OurGenerator
from experiments.throughput.side import Case, Start, timed

SHORT = ["--prompt-tokens", "40", "--new-tokens", "4", "--repeats", "1", "--threads", "1", "--dtype", "fp32"]


class Uneven:
    """Gives the prompts their first tokens in different steps, like an engine that prefills one after another."""

    def __init__(self) -> None:
        self.continued: list[int] = []
        self.steps = 0

    def submit(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        self.limit = new_tokens
        self.continued = [0] * len(prompts)

    def step(self) -> Sequence[int]:
        self.steps += 1
        for index in range(min(self.steps, len(self.continued))):
            self.continued[index] = min(self.continued[index] + 1, self.limit)
        return self.continued


def test_a_case_runs_until_every_prompt_has_its_tokens() -> None:
    generator = Uneven()
    speed = timed(generator, Case(batch=3, prompt_tokens=10, new_tokens=5, seed=1))
    assert generator.continued == [5, 5, 5]
    assert generator.steps == 7
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0


def test_cases_of_one_seed_have_the_same_prompts_and_others_share_none() -> None:
    first, again, other = (Case(2, 30, 1, seed).prompts() for seed in (1, 1, 2))
    assert first == again
    assert first[0] != first[1]
    assert first[0][:16] != other[0][:16]
    assert [len(prompt) for prompt in first] == [30, 30]


def test_our_side_generates_what_is_asked(tiny_folder: Path) -> None:
    generator = OurGenerator(Start(str(tiny_folder), "fp32", 1, 64))
    generator.submit(Case(2, 40, 3, 1).prompts(), 3)
    continued: Sequence[int] = [0]
    while min(continued) < 3:
        continued = generator.step()
    assert continued == [3, 3]
    assert generator.step() == [3, 3]


def test_without_vllm_the_recorded_ratio_is_shown_as_recorded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert main([*SHORT, "--model", str(tiny_folder), "--json", str(file)]) == 0
    assert "Recorded, not measured now" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [case["batch"] for case in written["cases"]] == [1, 8]
    assert all(case["theirs"] is None and case["ours"]["decode_tokens_per_s"] > 0 for case in written["cases"])
    assert {ratio["batch"] for ratio in written["recorded"]["ratios"]} == {1, 8}


def test_a_side_that_cannot_start_is_told_with_its_words(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module: vllm >&2\nexit 1\n")
    python.chmod(0o755)
    assert main([*SHORT, "--model", str(tiny_folder), "--vllm-python", str(python)]) == 2
    error = capsys.readouterr().err
    assert "ended early" in error
    assert "no such module: vllm" in error


def test_vllm_gets_the_same_threads_and_no_network() -> None:
    environment = vllm_environment({"HOME": "/home"}, 3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HOME"] == "/home"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_both_sides_answer_every_case(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    how = ["--quick", "--threads", "1", "--new-tokens", "8", "--json", str(file)]
    assert main([*how, "--vllm-python", os.environ["ATTNSTORE_VLLM_PYTHON"]]) == 0
    written = json.loads(file.read_text())
    assert all(case["prefill_ratio"] > 0 and case["decode_ratio"] > 0 for case in written["cases"])
    assert "recorded" not in written
