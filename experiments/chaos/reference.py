"""`python -m experiments.chaos.reference`: prompts and their continuations, from an engine without a store and without concurrent
requests.

Prompts where a token wins by less than `_MARGIN_MIN` are left out, because batches of another shape may round it the other way
(fp32).
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Iterator
from typing import Final

import torch

from attnstore.command_line import CommandParser
from attnstore.core.layout import DType
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel, load_model
from experiments.options import COUNT

_MARGIN_MIN: Final = 0.01
_CHARACTERS: Final = 1_200


def main() -> int:
    """Prints one JSON object: prompt -> text."""
    parser = CommandParser("python -m experiments.chaos.reference")
    parser.add_argument("--prompts", type=COUNT, default=8)
    parser.add_argument("--tokens", type=COUNT, default=12)
    parser.add_argument("--threads", type=Whole(1, THREADS_MAX), default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(None, DType.FP32)
    with Engine(model, EngineOptions(), store=None) as engine:
        texts: dict[str, str] = {}
        for prompt in _prompts():
            text, margin = _continued(engine, model, prompt, options.tokens)
            if margin >= _MARGIN_MIN:
                texts[prompt] = text
            if len(texts) == options.prompts:
                break
    print(json.dumps(texts))
    return 0


def _prompts() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    return (topics[name][:_CHARACTERS] for name in sorted(topics) if len(topics[name]) >= _CHARACTERS)


def _continued(engine: Engine, model: LoadedModel, prompt: str, count: int) -> tuple[str, float]:
    """Returns the continuation, and the smallest lead of a token over the next best."""
    sampling = SamplingParams(max_tokens=count, logits=True)
    sequence = engine.submit(model.tokenizer(prompt, verbose=False).input_ids, sampling)
    tokens = []
    while sequence.finish_reason is None:
        tokens += engine.step()
    leads = [(top[0] - top[1]).item() for token in tokens if token.logits is not None for top in (token.logits.topk(2).values,)]
    return "".join(token.text for token in tokens), min(leads)


if __name__ == "__main__":
    sys.exit(main())
