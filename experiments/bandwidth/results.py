"""The results of a run: the samples of every cell, and the rows, medians and ratios computed from them.

Owns: `Cell`, `Results`. Invariant: a ratio is the median of ratios within a round, so that a slow minute of the machine, which
affects both sides, does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from statistics import median
from typing import TypedDict

from experiments.bandwidth.lane import Sample

PAGE_BYTES_SMALL = 368_640
"""SmolLM2-135M, 16 tokens, bf16: the page of this project's reference figures."""
PAGE_BYTES_LARGE = 2 << 20
"""Llama-3-8B, 16 tokens, bf16."""


class Row(TypedDict):
    """One line of the JSON. `gb_per_s` is the median over rounds, in 10^9 bytes; latencies are of one operation (a batch)."""

    transport: str
    op: str
    page_bytes: int
    batch: int
    gb_per_s: float
    p50_us: float
    p99_us: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One combination of what is measured."""

    transport: str
    op: str
    page_bytes: int
    batch: int

    @property
    def verb(self) -> str:
        """The verb as a lane names it."""
        return f"{self.transport} {self.op}"


@dataclass
class Results:
    """`samples[cell]` has one sample per round."""

    samples: dict[Cell, list[Sample]] = field(default_factory=dict)

    def add(self, cell: Cell, sample: Sample) -> None:
        """Adds the sample of the next round."""
        self.samples.setdefault(cell, []).append(sample)

    def merge(self, other: Results) -> None:
        """Adds the cells of another run."""
        self.samples.update(other.samples)

    def gb_per_s(self, cell: Cell) -> float:
        """The median over rounds."""
        return median(sample.gb_per_s for sample in self.samples[cell])

    def latency_us(self, cell: Cell, quantile: float) -> float:
        """The quantile over all operations of all rounds."""
        return quantile_us((ns for sample in self.samples[cell] for ns in sample.ns), quantile)

    def best(self, cells: Iterable[Cell]) -> Cell | None:
        """Returns the fastest of the cells, or None if there are none."""
        return max(cells, key=self.gb_per_s, default=None)

    def ratio(self, cell: Cell, reference: Cell, of: Callable[[Sample], float] = attrgetter("gb_per_s")) -> float:
        """Returns how many times as fast (or as large) as the reference the cell is: the median of the rounds' ratios."""
        pairs = zip(self.samples[cell], self.samples[reference], strict=False)
        return median(of(one) / of(other) for one, other in pairs)

    def rows(self) -> list[Row]:
        """Returns one row per cell, in the order of measurement."""
        return [self._row(cell) for cell in self.samples]

    def _row(self, cell: Cell) -> Row:
        samples = self.samples[cell]
        cpu_ns = sum(sample.client_ns + sample.server_ns for sample in samples)
        return Row(
            transport=cell.transport,
            op=cell.op,
            page_bytes=cell.page_bytes,
            batch=cell.batch,
            gb_per_s=round(self.gb_per_s(cell), 3),
            p50_us=round(self.latency_us(cell, 0.5), 1),
            p99_us=round(self.latency_us(cell, 0.99), 1),
            cpu_s_per_gb=round(cpu_ns / sum(sample.bytes for sample in samples), 3),
        )


def quantile_us(durations_ns: Iterable[int], quantile: float) -> float:
    """Returns the smallest duration that at least a share of `quantile` of them does not exceed, in microseconds."""
    ordered = sorted(durations_ns)
    return ordered[max(0, -int(-quantile * len(ordered) // 1) - 1)] / 1000
