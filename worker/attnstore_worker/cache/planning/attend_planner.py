"""The fourth choice: leave a prefix in the store and attend to it there, or have it here. Arithmetic on forecasts, nothing else.

Owns: `AttendForecast`, what both ways cost, and the rules that follow from it. Pure: no clock, no state, no I/O.

Having the blocks here costs `load_ttft_ms` once, and then a resident step for each token; leaving them there begins at once, and
each step is longer by its round trips. With n tokens to come,

    attend(n) = attend_ttft + (n - 1) * attend_step
    load(n)   = load_ttft   + (n - 1) * resident_step

so short answers attend and long ones load. How many tokens come is not known. A sequence therefore also moves when what it has paid
for attending reaches the price of moving: it never pays more than twice what the better choice would have cost (the rule for
renting skis: Karlin et al., 1988).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GAIN_MIN: Final = 0.1
"""A change must be predicted to save this share of what it costs: forecasts are not exact, and moving to and fro is for nothing."""


@dataclass(frozen=True, slots=True)
class AttendForecast:
    """One sequence whose prefix lies in the store. `attend_ttft_ms`, `load_ttft_ms`: until its next token, with the prefix left
    there, and with it fetched or computed; `attend_step_ms`, `resident_step_ms`: each step after that.
    """

    attend_ttft_ms: float
    attend_step_ms: float
    load_ttft_ms: float
    resident_step_ms: float

    def attend_ms(self, steps: float) -> float:
        """Until the last of so many steps, at least one."""
        return self.attend_ttft_ms + max(steps - 1, 0) * self.attend_step_ms

    def load_ms(self, steps: float) -> float:
        """The same with the prefix here."""
        return self.load_ttft_ms + max(steps - 1, 0) * self.resident_step_ms

    @property
    def rent_ms(self) -> float:
        """How much longer a step takes for the prefix being there."""
        return self.attend_step_ms - self.resident_step_ms

    def attends(self, steps: float) -> bool:
        """Of a sequence that has nothing here: leaving its prefix in the store is better where so many steps are expected."""
        return self.attend_ms(steps) * (1 + GAIN_MIN) < self.load_ms(steps)

    def moves(self, *, spent: float, expected: float, most: float) -> bool:
        """Of a sequence that has attended for `spent` steps, with `expected` to come and never more than `most`: its prefix should
        be here from now on.
        """
        price_ms = self.load_ttft_ms * (1 + GAIN_MIN)
        return self.rent_ms * most > price_ms and self.rent_ms * max(expected, spent) > price_ms

    def leaves(self, expected: float, other_load_ms: float) -> bool:
        """Of a resident sequence with so many steps to come: it should attend, so that another keeps blocks which take
        `other_load_ms` to be had again.
        """
        return self.rent_ms * expected * (1 + GAIN_MIN) < other_load_ms
