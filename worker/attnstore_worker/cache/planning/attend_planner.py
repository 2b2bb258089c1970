"""The choice between leaving a prefix in the store and attending to it there, or having it here. Arithmetic on forecasts.

Owns: `AttendForecast`, the costs of both ways, and the rules that follow from it; `ChunkForecast`, the same for one chunk of a
prompt whose first blocks stay in the store. Pure: no clock, no state, no I/O.

Having the blocks here costs `load_ttft_ms` once, and then a resident step per token. Leaving them there begins at once, but each
step takes longer by its round trips. With n tokens to come,

    attend(n) = attend_ttft + (n - 1) * attend_step
    load(n)   = load_ttft   + (n - 1) * resident_step

so short answers attend and long ones load. The number of tokens is not known in advance. A sequence therefore also loads its blocks
when the extra cost of attending reaches the price of loading: it never pays more than twice the cost of the better choice (the ski
rental rule: Karlin et al., 1988).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GAIN_MIN: Final = 0.1
"""A change must be predicted to save this share of its cost, because forecasts are inexact and changing back and
forth is useless.
"""


@dataclass(frozen=True, slots=True)
class AttendForecast:
    """One sequence whose prefix is in the store. `attend_ttft_ms`, `load_ttft_ms`: time to its next token, with the prefix left
    there, and with it fetched or computed; `attend_step_ms`, `resident_step_ms`: each step after that.
    """

    attend_ttft_ms: float
    attend_step_ms: float
    load_ttft_ms: float
    resident_step_ms: float

    def attend_ms(self, steps: float) -> float:
        """Returns the time to the end of `steps` steps, at least one."""
        return self.attend_ttft_ms + max(steps - 1, 0) * self.attend_step_ms

    def load_ms(self, steps: float) -> float:
        """Returns the same with the prefix here."""
        return self.load_ttft_ms + max(steps - 1, 0) * self.resident_step_ms

    @property
    def extra_ms(self) -> float:
        """How much longer a step takes because the prefix is there."""
        return self.attend_step_ms - self.resident_step_ms

    def attends(self, steps: float) -> bool:
        """Returns, for a sequence without blocks here, whether leaving its prefix in the store is better for the expected number of
        steps.
        """
        return self.attend_ms(steps) * (1 + GAIN_MIN) < self.load_ms(steps)

    def moves(self, *, spent: float, expected: float, most: float) -> bool:
        """Returns whether a sequence that has attended for `spent` steps, with `expected` to come and never more than `most`,
        should have its prefix here from now on.
        """
        price_ms = self.load_ttft_ms * (1 + GAIN_MIN)
        return self.extra_ms * most > price_ms and self.extra_ms * max(expected, spent) > price_ms

    def leaves(self, expected: float, other_load_ms: float) -> bool:
        """Returns whether a resident sequence with that many steps to come should attend, so that another one keeps blocks whose
        reload takes `other_load_ms`.
        """
        return self.extra_ms * expected * (1 + GAIN_MIN) < other_load_ms


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """`rows` tokens of a sequence behind its first `blocks` blocks, of `page_bytes` each, in the store. At each of the `layers`
    their rows are sent in `queries` queries, or the blocks arrive `window_blocks` at a time. `row_bytes`: bytes of one row's
    queries and answers over all layers.
    """

    rows: int
    blocks: int
    block_tokens: int
    page_bytes: int
    layers: int
    queries: int
    window_blocks: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkForecast:
    """One chunk behind blocks in the store. `attend_ms`: its rows are sent to the nodes; `fetch_ms`: the blocks are fetched layer
    by layer, and none of them is kept.
    """

    attend_ms: float
    fetch_ms: float

    @property
    def fetches(self) -> bool:
        """Whether the chunk should fetch."""
        return self.fetch_ms * (1 + GAIN_MIN) < self.attend_ms


def fetched_chunk_ms(compute_ms: float, windows: int, window_ms: float) -> float:
    """Returns the time of a chunk of `compute_ms` beside which `windows` windows arrive one after the other in `window_ms` each:
    the first is waited for, and of the others what takes longer than computing.
    """
    return window_ms + max(compute_ms, (windows - 1) * window_ms)
