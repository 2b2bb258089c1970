"""Speculative decoding: guesses of the next tokens, checked by the model in one pass, so that one round trip serves several tokens.

Owns: `draft` (prompt lookup), `accepted_tokens` (verification), `DraftLength` (how many guesses pay) and `Speculation`, which does
all of it for an engine. Invariant: the tokens are those that each sequence's sampler would have drawn one by one, whatever was
guessed.

Guesses are the tokens that followed the last occurrence of the sequence's own last n-gram (prompt lookup decoding, Saxena 2023;
LLMA, Yang et al. 2023): free, and good on text that repeats itself. Verification draws from the model's distribution at each row
and goes on while the draw is the guess. For a guess that is certain (its own distribution is a point) that is rejection sampling
(Leviathan et al. 2023): the guess `d` is accepted with probability `p(d)`, and what is drawn otherwise has the distribution `p`
without `d`. And it draws from the generator once for each token, in order, so a seed gives the same tokens with and without
speculation.

Where nothing repeats, and round trips are what a step is made of, the model itself guesses: it attends to the blocks that are here
and asks no node. A recent window says much of the next token (as a draft: TriForce, Sun et al. 2024). What that writes into the
pool is wrong in its keys and values; the step that checks the guesses computes all of it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from attnstore.clock import Clock
from attnstore_worker.engine.sampler import Peak, Sampler, peaks
from attnstore_worker.engine.sequence import Chunk, next_chunk
from attnstore_worker.engine.sequence import Sequence as Prompted

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


def accepted_tokens(sampler: Sampler, drafts: Sequence[int], rows: Sequence[Tensor], highest: Sequence[Peak]) -> list[int]:
    """The next tokens from `len(drafts) + 1` rows of fp32 logits and their peaks. Row `i` knows the first `i` drafts.

    All drafts that are drawn, and the first token that is none of them: at least one, at most `len(drafts) + 1`. A row that is not
    finite ends them, as if it had not been computed; where it is the first it raises `LogitsNotFinite`.
    """
    tokens: list[int] = []
    for row, peak, guess in zip(rows, highest, [*drafts, None], strict=True):
        if tokens and not peak.is_finite:
            break
        tokens.append(sampler.sample(row, peak))
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
        self._made_ms: float | None = None

    @property
    def acceptance(self) -> float:
        """Estimated probability that a guess is right, given that those before it were."""
        return self._right / self._tried

    def made(self, drafts: int, elapsed_ms: float) -> None:
        """Making so many guesses took so long, which is part of what the step takes. Never told where guesses are free."""
        each_ms = elapsed_ms / drafts
        self._made_ms = each_ms if self._made_ms is None else _DECAY * self._made_ms + (1 - _DECAY) * each_ms

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
        """`base` and `each` by least squares over the recent steps; without enough of them a guess costs a twentieth of a step, and
        what it took to make it.
        """
        if self._samples == 0:
            return 1.0, _EACH_SHARE
        mean_k, mean_ms = self._sum_k / self._samples, self._sum_ms / self._samples
        variance = self._sum_kk / self._samples - mean_k * mean_k
        slope = (self._sum_k_ms / self._samples - mean_k * mean_ms) / variance if variance > _VARIANCE_MIN else -1.0
        if slope <= 0:
            made_ms = self._made_ms or 0.0
            slope = made_ms + _EACH_SHARE * max(mean_ms - made_ms * mean_k, 0.0) / (1 + _EACH_SHARE * mean_k)
        return max(mean_ms - slope * mean_k, slope), slope


class Speculation:
    """Guesses for the sequences of one engine, and the tokens that follow from checking them. Counts are since the start."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._length = DraftLength()
        self._resident_length = DraftLength()
        self._from_residents: set[Prompted] = set()
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
        drafts_max = self._length.best() if _decoding(running) else 0
        for sequence in running:
            left = min(drafts_max, _room(sequence, tokens_max if sequence.attend.attends else min(tokens_max, pool_tokens)))
            sequence.drafts = draft(sequence.token_ids, left) if left > 0 else ()

    def draft_from_residents(
        self, running: Sequence[Prompted], run: Callable[[Sequence[Chunk]], Tensor], *, tokens_max: int, chunk_tokens: int
    ) -> bool:
        """Gives those that attend to blocks in the store, and have no guesses, the model's own by its other blocks, one after the
        other: `run` computes chunks in that way, as `Runner.run`. No table grows for that. False where nobody was given any.
        """
        self._from_residents.clear()
        if not _decoding(running):
            return False
        began_ms = self._clock.now_ms()
        drafts_max = self._resident_length.best()
        wanted = {
            sequence: min(drafts_max, _room(sequence, tokens_max), sequence.table.capacity_tokens - len(sequence.token_ids))
            for sequence in running
            if sequence.attend.prefix is not None and sequence.table is not None and not sequence.drafts
        }
        self._from_residents.update(wanted)
        most_drafts = max(wanted.values(), default=0)
        for count in range(1, most_drafts + 1):
            drafting = [sequence for sequence, most in wanted.items() if count <= most]
            rows = run([next_chunk(sequence, chunk_tokens) for sequence in drafting])
            for sequence, guesses in zip(drafting, rows.split_with_sizes([count] * len(drafting)), strict=True):
                sequence.drafts += (peaks(guesses[-1:])[0].token_id,)
        if most_drafts > 0:
            self._resident_length.made(most_drafts, self._clock.now_ms() - began_ms)
        return most_drafts > 0

    def next_tokens(self, chunk: Chunk, rows: Sequence[Tensor], highest: Sequence[Peak], alone_ms: float | None) -> list[int]:
        """The tokens that follow from a chunk that gives tokens: from its rows of `Runner.run`, with their peaks.

        `alone_ms` is how long the step took where it computed nothing else. Raises `LogitsNotFinite`.
        """
        tokens = accepted_tokens(chunk.sequence.sampler, chunk.drafts, rows, highest)
        accepted = len(tokens) - 1
        self._steps += 1
        self.checked += len(chunk.drafts)
        self.accepted += accepted
        if alone_ms is not None and chunk.end - chunk.begin == 1:
            length = self._resident_length if chunk.sequence in self._from_residents else self._length
            length.observe(len(chunk.drafts), accepted, alone_ms)
        return tokens


def _decoding(running: Sequence[Prompted]) -> bool:
    return all(len(sequence.token_ids) - sequence.computed_tokens == 1 for sequence in running)


def _room(sequence: Prompted, tokens_max: int) -> int:
    """How many guesses could be of use: no more than the tokens asked for, nor than the sequence may grow to."""
    unasked = sequence.sampling.max_tokens - len(sequence.generated) - 1
    return min(unasked, tokens_max - len(sequence.token_ids) - 1)
