"""This worker's side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from attnstore.allocator import keep_freed_memory
from attnstore.core.layout import DType
from attnstore.limits import MIB
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.engine import Sequence as EngineSequence
from attnstore_worker.model import load_model
from experiments.throughput.side import Start, serve


class OurGenerator:
    """The engine with its default options."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        keep_freed_memory()
        self._engine = Engine(load_model(Path(start.model), DType(start.dtype)), EngineOptions(pool_bytes=1024 * MIB))
        self._engine.warm_up()
        self._sequences: list[EngineSequence] = []

    def submit(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """See `Generator.submit`."""
        self._sequences = [self._engine.submit(prompt, SamplingParams(max_tokens=new_tokens)) for prompt in prompts]

    def step(self) -> Sequence[int]:
        """See `Generator.step`."""
        self._engine.step()
        return [len(sequence.generated) for sequence in self._sequences]


if __name__ == "__main__":
    serve(OurGenerator)
