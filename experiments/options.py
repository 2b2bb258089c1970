"""Types of options that experiments share. The parsers, and their checks, are those of the commands."""

from __future__ import annotations

from typing import Final

from attnstore.option_types import Number, Whole

COUNT: Final = Whole(1, 1_000_000_000)
SEED: Final = Whole(0, (1 << 63) - 1)
POSITIVE: Final = Number(0, 1e9, above=True)
"""A time, a rate or a factor."""
