"""The comparison of the worker with a model's own module.

Owns: the runs of one model (cold, after hits of every length, in chunks of three sizes, with drafts), and the reference: the
module's own forward over all tokens at once, without a cache. Invariant: a run that did not exercise what it is for is an error,
not an agreement.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
import transformers
from torch import Tensor

from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore
from experiments.models.tiny import VOCABULARY

DIFFERENCE_MAX: Final = 1e-4
CHUNKS_TOKENS: Final = (16, 64, 256)
_BLOCK_TOKENS: Final = 16
_PROMPT_TOKENS: Final = 141
"""Eight full blocks and a part of one; more than two chunks of 64 and less than one of 256."""
_ANSWER_TOKENS: Final = 4
_FLUSH_MS_MAX: Final = 10_000.0


class Agreement(NamedTuple):
    """The largest difference of a logit in all runs, divided by the largest logit if that is above 1, and the run that had it."""

    difference: float
    run: str


def prompt() -> list[int]:
    """Returns tokens below `VOCABULARY`, a prime, in which every token follows every other: a draft exists for any token of the
    model.

    A walk around the vocabulary in steps of one size contains all pairs at that distance.
    """
    pairs = [token for token in range(VOCABULARY) for _ in range(2)]
    for distance in range(2, VOCABULARY):
        pairs += [step * distance % VOCABULARY for step in range(VOCABULARY)]
    return (pairs + pairs)[:_PROMPT_TOKENS]


def check_agreement(model: LoadedModel, folder: Path) -> Agreement:
    """Compares `model`, loaded from `folder` in fp32, with the module there."""
    own = _OwnForward(folder)
    difference, run = max((own.difference(*given), run) for run, given in _runs(model))
    return Agreement(difference, run)


def pages_of(model: LoadedModel) -> list[bytes]:
    """Returns the pages of the prompt."""
    store = MemoryStore()
    _run(model, CHUNKS_TOKENS[-1], store)
    return list(store.pages.values())


def _runs(model: LoadedModel) -> Iterator[tuple[str, tuple[list[int], Tensor]]]:
    store = MemoryStore()
    for chunk_tokens in CHUNKS_TOKENS:
        yield f"chunks of {chunk_tokens}", _run(model, chunk_tokens, store if chunk_tokens == CHUNKS_TOKENS[0] else None)
    blocks = list(store.pages.items())
    for hits in range(1, _PROMPT_TOKENS // _BLOCK_TOKENS + 1):
        part = MemoryStore()
        part.pages = dict(blocks[:hits])
        yield f"{hits} blocks hit", _run(model, CHUNKS_TOKENS[1], part, hits=hits)
    yield "guesses", _run(model, CHUNKS_TOKENS[1], None, speculate=True)


def _run(
    model: LoadedModel, chunk_tokens: int, store: MemoryStore | None, *, hits: int = 0, speculate: bool = False
) -> tuple[list[int], Tensor]:
    """Returns the tokens of prompt and answer, and the logits of the answer."""
    options = EngineOptions(16 * model.layout(_BLOCK_TOKENS).page_bytes, _BLOCK_TOKENS, chunk_tokens, speculate=speculate)
    with Engine(model, options, store=store) as engine:
        sequence = engine.submit(prompt(), SamplingParams(max_tokens=_ANSWER_TOKENS, logits=True))
        logits: list[Tensor] = []
        while sequence.finish_reason is None:
            logits += [token.logits for token in engine.step() if token.logits is not None]
        assert engine.flush(_FLUSH_MS_MAX)
        hit_tokens = sum(tier.hit_tokens for tier in engine.statistics().tiers.values())
        assert hit_tokens == hits * _BLOCK_TOKENS, f"{hit_tokens} tokens were hits"
        assert bool(engine.batching().drafts_checked) == speculate
    return sequence.token_ids, torch.stack(logits)


class _OwnForward:
    """The logits of the module by itself."""

    def __init__(self, folder: Path) -> None:
        given = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
        self._module = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **given).eval()
        self._known: dict[tuple[int, ...], Tensor] = {}

    def difference(self, token_ids: list[int], logits: Tensor) -> float:
        """Returns the difference of `logits` from the module's logits of the last of `token_ids`."""
        expected = self._logits(tuple(token_ids[:-1]))[-len(logits) :]
        return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))

    def _logits(self, token_ids: tuple[int, ...]) -> Tensor:
        if token_ids not in self._known:
            with torch.inference_mode():
                self._known[token_ids] = self._module(torch.tensor([token_ids]), use_cache=False).logits[0].float()
        return self._known[token_ids]
