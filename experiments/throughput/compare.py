"""Both sides in turns: their processes, and the comparison of their answers.

Owns: the children of a run and `Comparison`. Invariant: at most one side works at a time, and both work on the same cases.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Final

from experiments.bandwidth.processes import Child
from experiments.throughput.side import Case, Speed, Start
from experiments.vllm import session

_START_S_MAX: Final = 300.0
"""vLLM compiles its graphs when it starts."""
_CASE_S_MAX: Final = 300.0
_PAUSE_S: Final = 0.5
"""Pause before each turn, because the threads of the side that has just worked spin for up to 0.2 s on the cores of the other."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over the repetitions of a case. `theirs` is None if only this worker ran."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    ours: Speed
    theirs: Speed | None

    @property
    def prefill_ratio(self) -> float | None:
        """Ours / theirs."""
        return self.ours.prefill_tokens_per_s / self.theirs.prefill_tokens_per_s if self.theirs else None

    @property
    def decode_ratio(self) -> float | None:
        """Ours / theirs."""
        return self.ours.decode_tokens_per_s / self.theirs.decode_tokens_per_s if self.theirs else None


def compare(start: Start, cases: Sequence[Case], repeats: int, vllm_python: Path | None, log: IO[str]) -> list[Comparison]:
    """Runs each case `repeats` times on each side, in turns, after one unmeasured time. The engines' output goes to `log`.

    Raises `ChildEnded` if a side does not start or breaks; the log says why.
    """
    argument = json.dumps(asdict(start))
    with ExitStack() as stack:
        ours = [sys.executable, "-m", "experiments.throughput.ours", argument]
        children = [stack.enter_context(Child(ours, stderr=log))]
        if vllm_python is not None:
            theirs = [str(vllm_python), "-m", "experiments.throughput.theirs", argument]
            environment = vllm_environment(os.environ, start.threads)
            children.append(stack.enter_context(Child(theirs, stderr=log, environment=environment)))
        for child in children:
            child.first_line(_START_S_MAX)
        return [_compared(children, case, repeats) for case in cases]


def vllm_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment of vLLM on a CPU, with its engine in the process that steps it."""
    return {**session.environment(environment, threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _compared(children: Sequence[Child], case: Case, repeats: int) -> Comparison:
    speeds: list[list[Speed]] = [[] for _ in children]
    for repeat in range(repeats + 1):
        # New prompts each time, so that no side has them cached.
        line = json.dumps(asdict(Case(case.batch, case.prompt_tokens, case.new_tokens, case.seed + repeat)))
        for child, side in zip(children, speeds, strict=True):
            time.sleep(_PAUSE_S)
            side.append(Speed(**json.loads(child.ask_within(_CASE_S_MAX, line))))
    ours, *others = [_median(side[1:]) for side in speeds]
    return Comparison(case.batch, case.prompt_tokens, case.new_tokens, repeats, ours, others[0] if others else None)


def _median(speeds: Iterable[Speed]) -> Speed:
    several = list(speeds)
    return Speed(
        prefill_tokens_per_s=median(each.prefill_tokens_per_s for each in several),
        decode_tokens_per_s=median(each.decode_tokens_per_s for each in several),
    )
