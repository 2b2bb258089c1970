"""One side of the comparison: a process that receives cases on standard input and answers with figures.

Owns: `Start`, `Case`, `Speed`, the timing of both sides, and the loop of such a process. Standard library only, because it also
runs under the interpreter that has vLLM.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

_FIRST_TOKEN_ID = 3
_VOCABULARY = 49_000
"""Random prompts draw from these ids, which SmolLM2 and most other models have."""


@dataclass(frozen=True, slots=True)
class Start:
    """The start parameters of a side: a Hugging Face folder, `fp32` or `bf16`, threads, and the longest sequence to come."""

    model: str
    dtype: str
    threads: int
    tokens_max: int


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` prompts of `prompt_tokens` random tokens at once, each continued greedily by `new_tokens`."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    seed: int

    def prompts(self) -> list[list[int]]:
        """Returns the same prompts on both sides; no two cases of different seeds share a block."""
        generator = random.Random(f"{self.seed} {self.batch} {self.prompt_tokens}")
        return [[generator.randrange(_FIRST_TOKEN_ID, _VOCABULARY) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Speed:
    """Prefill: prompt tokens / time until every sequence has its first token. Decode: later tokens / the time they took."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Generator(Protocol):
    """The interface of an engine that runs in steps."""

    def submit(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """Queues prompts, each to be continued greedily by exactly `new_tokens`."""
        ...

    def step(self) -> Sequence[int]:
        """Runs one step. Returns by how many tokens each prompt has been continued, in the order of submission."""
        ...


def timed(generator: Generator, case: Case) -> Speed:
    """Runs a case to its end."""
    prompts = case.prompts()
    began_s = time.perf_counter()
    generator.submit(prompts, case.new_tokens)
    while min(continued := generator.step()) < 1:
        pass
    first_s = time.perf_counter()
    at_first = sum(continued)
    while sum(continued) < case.batch * case.new_tokens:
        continued = generator.step()
    end_s = time.perf_counter()
    return Speed(
        prefill_tokens_per_s=case.batch * case.prompt_tokens / (first_s - began_s),
        decode_tokens_per_s=(case.batch * case.new_tokens - at_first) / (end_s - first_s),
    )


def serve(create: Callable[[Start], Generator]) -> None:
    """Prints `ready` and answers cases until standard input ends. The engine's output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generator = create(Start(**json.loads(sys.argv[1])))
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(asdict(timed(generator, Case(**json.loads(line))))), file=answers)
