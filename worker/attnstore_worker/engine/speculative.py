"""Speculative decoding: drafts of the next tokens, verified by the model in one pass, so that one round trip serves several tokens.

Owns: `draft` (prompt lookup), `accepted_tokens` (verification), `DraftLength` (how many drafts pay) and `Speculation`, which
combines them for an engine. Invariant: the tokens are those that each sequence's sampler would have drawn one by one, whatever the
drafts.

Drafts are the tokens that followed the last occurrence of the sequence's own last n-gram (prompt lookup decoding, Saxena 2023;
LLMA, Yang et al. 2023): free, and good on repetitive text. Verification draws from the model's distribution at each row and
continues while the draw equals the draft. For a deterministic draft (a point distribution) this is rejection sampling (Leviathan et
al. 2023): the draft `d` is accepted with probability `p(d)`, and otherwise the drawn token has the distribution `p` without `d`. It
draws from the generator once per token, in order, so a seed gives the same tokens with and without speculation.

If nothing repeats, and round trips dominate a step, the model itself drafts: it attends only to the blocks that are here and asks
no node. A recent window predicts much of the next token (as a draft: TriForce, Sun et al. 2024). The keys and values that this
writes into the pool are wrong; the step that verifies the drafts computes all of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from attnstore.clock import Clock
from attnstore_worker.engine.sampler import Peak, Sampler
from attnstore_worker.engine.sequence import Chunk, next_chunk
from attnstore_worker.engine.sequence import Sequence as Prompted

DRAFTS_MAX: Final = 15
"""Drafts of one step: with the known token, rows that the attention kernels still treat as decoding."""
NGRAM_MAX: Final = 4
NGRAM_MIN: Final = 2
_LOOK_BACK_TOKENS: Final = 8192
_DECAY: Final = 0.95
_PRIOR: Final = (1.0, 2.0)
"""The prior: accepted and verified drafts that are assumed."""
_ACCEPTANCE_MIN: Final = 0.02
_EACH_SHARE: Final = 0.05
_VARIANCE_MIN: Final = 0.5

DraftResident = Callable[[Sequence[Chunk], Sequence[int]], list[list[int]]]
"""See `Runner.draft_resident`."""


def draft(token_ids: Sequence[int], drafts_max: int) -> tuple[int, ...]:
    """Returns the tokens after the latest earlier occurrence of the longest last n-gram that has one; none if nothing repeats.

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
    """Returns the next tokens from `len(drafts) + 1` rows of fp32 logits and their peaks. Row `i` knows the first `i` drafts.

    These are all accepted drafts and the first token that is not a draft: at least one, at most `len(drafts) + 1`. A row that is
    not finite ends them, as if it had not been computed; if it is the first row, raises `LogitsNotFinite`.
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
    """Chooses how many drafts a step verifies, from the cost of verification and the rate of acceptance.

    With an acceptance `a` of each draft, a step of `k` drafts gives `(1 - a ** (k + 1)) / (1 - a)` tokens (Leviathan et al. 2023)
    and takes `base + k * each` milliseconds. `base` includes the round trips and the weights, so more is drafted on slower
    networks.
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
        """Estimated probability that a draft is accepted, given that those before it were."""
        return self._right / self._tried

    def made(self, drafts: int, elapsed_ms: float) -> None:
        """Records the time of making drafts, which is part of the step's time. Not called if drafts are free."""
        each_ms = elapsed_ms / drafts
        self._made_ms = each_ms if self._made_ms is None else _DECAY * self._made_ms + (1 - _DECAY) * each_ms

    def observe(self, drafts: int, accepted: int, step_ms: float) -> None:
        """Records a step that verified `drafts` drafts of one sequence and accepted the first `accepted`."""
        self._samples = _DECAY * self._samples + 1
        self._sum_k = _DECAY * self._sum_k + drafts
        self._sum_ms = _DECAY * self._sum_ms + step_ms
        self._sum_kk = _DECAY * self._sum_kk + drafts * drafts
        self._sum_k_ms = _DECAY * self._sum_k_ms + drafts * step_ms
        # The prior makes drafting resume some time after it was given up.
        self._right = _DECAY * self._right + accepted + (1 - _DECAY) * _PRIOR[0]
        self._tried = _DECAY * self._tried + min(drafts, accepted + 1) + (1 - _DECAY) * _PRIOR[1]

    def best(self) -> int:
        """Returns the number of drafts with the most tokens per millisecond."""
        base_ms, each_ms = self._costs()
        rate = min(max(self.acceptance, _ACCEPTANCE_MIN), 0.999)

        def tokens_per_ms(drafts: int) -> float:
            return float((1 - rate ** (drafts + 1)) / (1 - rate) / (base_ms + drafts * each_ms))

        return max(range(DRAFTS_MAX + 1), key=tokens_per_ms)

    def _costs(self) -> tuple[float, float]:
        """Returns `base` and `each` by least squares over the recent steps; without enough of them a draft costs a twentieth of a
        step, plus the time of making it.
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
    """Drafts for the sequences of one engine, and the tokens after verification. Counts are since the start."""

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
        """Returns how many tokens a step gave a sequence on average; 1 if no draft was accepted."""
        return 1 + self.accepted / max(self._steps, 1)

    def draft(self, running: Sequence[Prompted], *, tokens_max: int, pool_tokens: int) -> None:
        """Gives each running sequence drafts, if all decode: prefill needs the room of a step, and gains nothing.

        No sequence grows past `tokens_max` by them, nor past `pool_tokens` unless it attends to blocks in the store.
        """
        drafts_max = self._length.best() if _decoding(running) else 0
        for sequence in running:
            left = min(drafts_max, _room(sequence, tokens_max if sequence.attend.attends else min(tokens_max, pool_tokens)))
            sequence.drafts = draft(sequence.token_ids, left) if left > 0 else ()

    def draft_from_residents(self, running: Sequence[Prompted], run: DraftResident, *, tokens_max: int, chunk_tokens: int) -> bool:
        """Drafts with the model for sequences that attend to blocks in the store and have no drafts, using only the blocks that are
        here. No table grows for it. Returns False if no sequence got a draft.
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
        drafting = sorted((each for each, most in wanted.items() if most > 0), key=lambda each: -wanted[each])
        if not drafting:
            return False
        counts = [wanted[sequence] for sequence in drafting]
        drafts = run([next_chunk(sequence, chunk_tokens) for sequence in drafting], counts)
        for sequence, own in zip(drafting, drafts, strict=True):
            sequence.drafts = tuple(own)
        self._resident_length.made(counts[0], self._clock.now_ms() - began_ms)
        return True

    def observe(self, chunk: Chunk, tokens: int, alone_ms: float | None) -> None:
        """Records how many tokens a chunk gave. `alone_ms` is the duration of the step if it computed nothing else."""
        accepted = tokens - 1
        self._steps += 1
        self.checked += len(chunk.drafts)
        self.accepted += accepted
        if alone_ms is not None and chunk.end - chunk.begin == 1:
            length = self._resident_length if chunk.sequence in self._from_residents else self._length
            length.observe(len(chunk.drafts), accepted, alone_ms)


def _decoding(running: Sequence[Prompted]) -> bool:
    return all(len(sequence.token_ids) - sequence.computed_tokens == 1 for sequence in running)


def _room(sequence: Prompted, tokens_max: int) -> int:
    """Returns how many drafts can be useful: at most the requested tokens, and at most what the sequence may grow to."""
    unasked = sequence.sampling.max_tokens - len(sequence.generated) - 1
    return min(unasked, tokens_max - len(sequence.token_ids) - 1)
