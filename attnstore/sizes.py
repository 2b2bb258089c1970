"""Sizes in bytes as text, and shares of a size.

Owns: `parse_size`, `size_text`, `Share` and `parse_share`. Units: `kB`, `MB` and so on are powers of 1000, `KiB`, `MiB` and so on
powers of 1024, in either case; `k` and `M` mean `kB` and `MB`, and `kbit` or `Mibit` an eighth of them.
"""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,5})")
_UNITS: Final = {"": 1.0, "b": 1.0, "bit": 1 / 8} | {
    f"{prefix}{unit}": base**power / divisor
    for power, prefix in enumerate("kmgtpe", 1)
    for unit, base, divisor in (("", 1000, 1), ("b", 1000, 1), ("ib", 1024, 1), ("bit", 1000, 8), ("ibit", 1024, 8))
}
_SHARE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%")


class Share(float):
    """A part of a whole, above 0 and at most 1, as a text such as `90%`."""

    def __str__(self) -> str:
        return f"{self * 100:.6g}%"


def parse_share(text: str) -> Share | None:
    """Returns the share of a text such as `90%` or `12.5 %`, or None for any other text, with 0% and all above 100%."""
    match = _SHARE.fullmatch(text)
    percent = float(match[1]) if match is not None else 0.0
    return Share(percent / 100) if 0 < percent <= 100 else None


def parse_size(text: str) -> int | None:
    """Returns the bytes of a text such as `512MiB`, `1.5 GB` or `4096`, rounded down, or None for any other text."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        return None
    return int(match[1]) if match[1].isdecimal() and unit == 1 else int(float(match[1]) * unit)


def size_text(size_bytes: float) -> str:
    """Returns the size with one decimal in the largest binary unit that it reaches, for example `1.5GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f}B"
    for prefix in "KMGTP":
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f}{prefix}iB"
    return f"{size_bytes / 1024:.1f}EiB"
