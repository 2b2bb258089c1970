"""The grid of a sweep: links, contexts and hit rates, and the number of rounds.

Owns: `Grid` and its two instances. Invariant: a cell is named by the fields of its row, so that a resumed run knows which cells are
done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class LinkCell:
    """One link: `gbit_per_s` in both directions."""

    rtt_ms: float
    gbit_per_s: float

    @property
    def spec(self) -> str:
        """The link in the form that `attnstore.links.parse_link` takes."""
        return f"{self.gbit_per_s * 1000:g}m@{self.rtt_ms:g}ms"

    def transfer_s(self, size_bytes: float) -> float:
        """Returns the shortest time for that many bytes."""
        return self.rtt_ms / 1e3 + size_bytes * 8 / (self.gbit_per_s * 1e9)


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the sweep."""

    link: LinkCell
    context_tokens: int
    hit_rate: float


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything that a run measures. Each time is the median of `rounds` runs; a measurement that takes longer than `once_s` runs
    once.

    On links below `halves_gbit_per_s` only a hit rate of 1 is measured, because nothing is fetched there anyway.
    """

    rtts_ms: tuple[float, ...]
    gbits_per_s: tuple[float, ...]
    contexts_tokens: tuple[int, ...]
    hit_rates: tuple[float, ...]
    rounds: int
    once_s: float
    halves_gbit_per_s: float
    faults: tuple[tuple[LinkCell, int], ...]
    decodes: tuple[tuple[LinkCell, int], ...]

    def links(self) -> Iterator[LinkCell]:
        """Returns all links, the slow ones first, because they take longest."""
        return (LinkCell(rtt_ms, gbit_per_s) for gbit_per_s in self.gbits_per_s for rtt_ms in self.rtts_ms)

    def cells(self, link: LinkCell) -> list[Cell]:
        """Returns the cells of one link."""
        rates = self.hit_rates if link.gbit_per_s >= self.halves_gbit_per_s else self.hit_rates[:1]
        return [Cell(link, context, hit_rate) for context in self.contexts_tokens for hit_rate in rates]


FULL: Final = Grid(
    rtts_ms=(0.0, 10.0, 50.0),
    gbits_per_s=(0.01, 0.1, 1.0, 10.0),
    contexts_tokens=(512, 2048, 6000),
    hit_rates=(1.0, 0.5),
    rounds=3,
    once_s=8.0,
    halves_gbit_per_s=0.1,
    faults=tuple((LinkCell(1.0, gbit_per_s), context) for gbit_per_s in (0.1, 1.0, 10.0) for context in (2048, 6000)),
    decodes=tuple((LinkCell(1.0, gbit_per_s), context) for gbit_per_s in (0.1, 1.0, 10.0) for context in (512, 2048)),
)
QUICK: Final = Grid(
    rtts_ms=(0.0, 10.0, 50.0),
    gbits_per_s=(0.1, 1.0, 10.0),
    contexts_tokens=(512, 2048),
    hit_rates=(1.0,),
    rounds=2,
    once_s=2.0,
    halves_gbit_per_s=0.1,
    faults=((LinkCell(1.0, 0.3), 2048),),
    decodes=((LinkCell(1.0, 1.0), 512),),
)
