"""Speculative decoding: guesses of the next tokens, checked by the model in one pass, so that one round trip serves several tokens.

Owns: `draft` (prompt lookup), `accepted_tokens` (verification), `DraftLength` (how many guesses pay) and `Speculation`, which does
all three for an engine. Invariant: the tokens are those that each sequence's sampler would have drawn one by one, whatever was
guessed.

Guesses are the tokens that followed the last occurrence of the sequence's own last n-gram (prompt lookup decoding, Saxena 2023;
LLMA, Yang et al. 2023): free, and good on text that repeats itself. Verification draws from the model's distribution at each row
and goes on while the draw is the guess. For a guess that is certain (its own distribution is a point) that is rejection sampling
(Leviathan et al. 2023): the guess `d` is accepted with probability `p(d)`, and what is drawn otherwise has the distribution `p`
without `d`. And it draws from the generator once for each token, in order, so a seed gives the same tokens with and without
speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, cat

from worker.engine.sampler import Sampler, sample_rows
from worker.engine.sequence import Chunk
from worker.engine.sequence import Sequence as Prompted

DRAFTS_MAX: Final = 15
"""Guesses of one step: with the known token, rows that the attention kernels still treat as decoding."""
NGRAM_MAX: Final = 4
NGRAM_MIN: Final = 2
_LOOK_BACK_TOKENS: Final = 8192
_DECAY: Final = 0.95
_PRIOR: Final = (1.0, 2.0)
"""Right and checked guesses that are taken for granted."""
_ACCEPTANCE_MIN: Final = 0.02
_EACH_SHARE: Final = 0.05
_VARIANCE_MIN: Final = 0.5


def draft(token_ids: Sequence[int], drafts_max: int) -> tuple[int, ...]:
    """The tokens after the latest earlier occurrence of the longest last n-gram that has one; none where nothing repeats.

    >>> draft([7, 1, 2, 3, 4, 5, 9, 1, 2], 3)
    (3, 4, 5)
    >>> draft([1, 2, 3], 3)
    ()
    """
    recent = list(token_ids[-_LOOK_BACK_TOKENS:])
    for size in range(min(NGRAM_MAX, len(recent) - 1), NGRAM_MIN - 1, -1):
        wanted = recent[-size:]
        for begin in range(len(recent) - size - 1, -1, -1):
            if recent[begin] == wanted[0] and recent[begin : begin + size] == wanted:
                return tuple(recent[begin + size : begin + size + drafts_max])
    return ()


def accepted_tokens(sampler: Sampler, drafts: Sequence[int], logits: Tensor) -> list[int]:
    """The next tokens from fp32 logits `[len(drafts) + 1, vocabulary]`, row `i` of which knows the first `i` drafts.

    All drafts that are drawn, and the first token that is none of them: at least one, at most `len(drafts) + 1`.
    """
    tokens: list[int] = []
    for row, guess in zip(logits, [*drafts, None], strict=True):
        tokens.append(sampler.sample(row))
        if tokens[-1] != guess:
            break
    return tokens


class DraftLength:
    """How many guesses a step should check, from what checking them has cost and how often they were right.

    With an acceptance `a` of each guess a step of `k` gives `(1 - a ** (k + 1)) / (1 - a)` tokens (Leviathan et al. 2023) and takes
    `base + k * each` milliseconds. `base` has the round trips and the weights in it, so the slower the network the more is guessed.
    """

    def __init__(self) -> None:
        self._right, self._tried = _PRIOR
        self._samples = 0.0
        self._sum_k = 0.0
        self._sum_ms = 0.0
        self._sum_kk = 0.0
        self._sum_k_ms = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a guess is right, given that those before it were."""
        return self._right / self._tried

    def observe(self, drafts: int, accepted: int, step_ms: float) -> None:
        """A step that checked `drafts` guesses of one sequence, of which the first `accepted` were right."""
        self._samples = _DECAY * self._samples + 1
        self._sum_k = _DECAY * self._sum_k + drafts
        self._sum_ms = _DECAY * self._sum_ms + step_ms
        self._sum_kk = _DECAY * self._sum_kk + drafts * drafts
        self._sum_k_ms = _DECAY * self._sum_k_ms + drafts * step_ms
        # The share of the prior brings guessing back where it was given up long ago.
        self._right = _DECAY * self._right + accepted + (1 - _DECAY) * _PRIOR[0]
        self._tried = _DECAY * self._tried + min(drafts, accepted + 1) + (1 - _DECAY) * _PRIOR[1]

    def best(self) -> int:
        """The number of guesses with the most tokens per millisecond."""
        base_ms, each_ms = self._costs()
        rate = min(max(self.acceptance, _ACCEPTANCE_MIN), 0.999)

        def tokens_per_ms(drafts: int) -> float:
            return float((1 - rate ** (drafts + 1)) / (1 - rate) / (base_ms + drafts * each_ms))

        return max(range(DRAFTS_MAX + 1), key=tokens_per_ms)

    def _costs(self) -> tuple[float, float]:
        """`base` and `each` by least squares over the recent steps; without enough of them a guess costs a twentieth of a step."""
        if self._samples == 0:
            return 1.0, _EACH_SHARE
        mean_k, mean_ms = self._sum_k / self._samples, self._sum_ms / self._samples
        variance = self._sum_kk / self._samples - mean_k * mean_k
        slope = (self._sum_k_ms / self._samples - mean_k * mean_ms) / variance if variance > _VARIANCE_MIN else -1.0
        if slope <= 0:
            slope = _EACH_SHARE * mean_ms / (1 + _EACH_SHARE * mean_k)
        return max(mean_ms - slope * mean_k, slope), slope


class Speculation:
    """Guesses for the sequences of one engine, and the tokens that follow from checking them. Counts are since the start."""

    def __init__(self) -> None:
        self._length = DraftLength()
        self.checked = 0
        self.accepted = 0
        self._steps = 0

    @property
    def tokens_per_step(self) -> float:
        """What a step gave a sequence on average; 1 where nothing was guessed right."""
        return 1 + self.accepted / max(self._steps, 1)

    def draft(self, running: Sequence[Prompted], *, tokens_max: int, pool_tokens: int) -> None:
        """Gives each running sequence guesses, where all decode: prefill needs the room of a step, and gains nothing.

        No sequence grows past `tokens_max` by them, nor past `pool_tokens` where it does not attend to blocks in the store.
        """
        decoding = all(len(sequence.token_ids) - sequence.computed_tokens == 1 for sequence in running)
        drafts_max = self._length.best() if decoding else 0
        for sequence in running:
            unasked = sequence.sampling.max_tokens - len(sequence.generated) - 1
            room = (tokens_max if sequence.attends else min(tokens_max, pool_tokens)) - len(sequence.token_ids) - 1
            left = min(drafts_max, unasked, room)
            sequence.drafts = draft(sequence.token_ids, left) if left > 0 else ()

    def next_tokens(self, chunks: Sequence[Chunk], logits: Tensor, step_ms: float) -> dict[Prompted, list[tuple[int, Tensor]]]:
        """For each sequence whose chunk gives tokens those tokens, with the logits `[vocabulary]` that each was drawn from.

        `logits` as from `Runner.run`; `step_ms` is how long the step took.
        """
        giving = [chunk for chunk in chunks if chunk.gives_token]
        rows = list(logits.split_with_sizes([1 + len(chunk.drafts) for chunk in giving]))
        self._steps += len(giving)
        alone = [index for index, chunk in enumerate(giving) if not chunk.drafts]
        drawn: dict[int, list[int]] = {}
        if alone:
            token_ids = sample_rows([giving[index].sequence.sampler for index in alone], cat([rows[index] for index in alone]))
            drawn = {index: [token_id] for index, token_id in zip(alone, token_ids, strict=True)}
        for index, chunk in enumerate(giving):
            if chunk.drafts:
                drawn[index] = accepted_tokens(chunk.sequence.sampler, chunk.drafts, rows[index])
                self.checked += len(chunk.drafts)
                self.accepted += len(drawn[index]) - 1
        if len(chunks) == len(giving) == 1 and chunks[0].end - chunks[0].begin == 1:
            self._length.observe(len(chunks[0].drafts), len(drawn[0]) - 1, step_ms)
        return {chunk.sequence: list(zip(drawn[index], rows[index], strict=False)) for index, chunk in enumerate(giving)}
