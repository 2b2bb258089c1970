"""The project's performance claims, each measured in this run as a ratio and judged.

Owns: the list of claims. Invariant: a claim whose contenders did not all run is reported as not measured, never as met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.bandwidth.results import PAGE_BYTES_LARGE, PAGE_BYTES_SMALL, Cell, Results

_LARGE_BATCH_MIN = 32


@dataclass(frozen=True, slots=True)
class Claim:
    """`measured` is None if a contender is missing; otherwise it must be at least (or, with `at_most`, at most) `bound`."""

    text: str
    measured: float | None
    bound: float
    at_most: bool = False
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """Returns one word."""
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured <= self.bound if self.at_most else self.measured >= self.bound) else "MISSED"


def claims(results: Results) -> list[Claim]:
    """Returns every claim on throughput and latency of pages, for each measured page size."""
    sizes = sorted({cell.page_bytes for cell in results.samples})
    found = [claim for page_bytes in sizes for claim in _of_page_size(results, page_bytes)]
    return [*found, _in_place(results)]


def _of_page_size(results: Results, page_bytes: int) -> Iterator[Claim]:
    size = f"{page_bytes:,} B"
    for op in ("read", "write"):
        worst = _worst(results, page_bytes, f"grpc {op}", f"grpc_bare {op}")
        yield Claim(f"{size}: grpc {op} over a bare grpcio stream, batch >= {_LARGE_BATCH_MIN}", worst, 0.9)
    for op, bound in (("read", 0.9), ("write", 0.75)):
        worst = _worst(results, page_bytes, f"tcp {op}", f"raw_tcp {op}")
        yield Claim(f"{size}: tcp {op} over raw TCP, batch >= {_LARGE_BATCH_MIN}", worst, bound)
    for text, ours, theirs, bound in (
        ("tcp read over Mooncake's best get", "tcp read", ("mooncake_get read",), 1.5),
        ("tcp write over Mooncake's best put", "tcp write", ("mooncake_put write",), 2.5),
        ("tcp read over redis-py's best read", "tcp read", ("redis_get read", "redis_mget read"), 2.5),
        ("tcp write over redis-py's best SET", "tcp write", ("redis_set write",), 4.0),
        ("shm write over redis-py's best SET", "shm_copy write", ("redis_set write",), 4.0),
        ("shm write over Mooncake's best put", "shm_copy write", ("mooncake_put write",), 2.5),
    ):
        yield Claim(f"{size}: {text}", _best_ratio(results, page_bytes, ours, theirs), bound)
    ours_us, theirs_us = (_latency_us(results, Cell(name, "read", page_bytes, 1)) for name in ("tcp", "mooncake_get"))
    measured = ours_us / theirs_us if ours_us and theirs_us else None
    yield Claim(f"{size}: p50 of a single tcp read over Mooncake's single get", measured, 0.75, at_most=True)
    yield Claim(
        f"{size}: shm copy over memcpy, batch >= {_LARGE_BATCH_MIN}",
        _worst(results, page_bytes, "shm_copy read", "memcpy read"),
        0.8,
    )


def _in_place(results: Results) -> Claim:
    large, small = (
        _latency_us(results, Cell("shm_in_place", "read", page_bytes, _LARGE_BATCH_MIN))
        for page_bytes in (PAGE_BYTES_LARGE, PAGE_BYTES_SMALL)
    )
    text = f"shm in place: time for a page of {PAGE_BYTES_LARGE:,} B over one of {PAGE_BYTES_SMALL:,} B"
    return Claim(text, large / small if large and small else None, 1.25, at_most=True)


def _worst(results: Results, page_bytes: int, ours: str, reference: str) -> float | None:
    """Returns the lowest ratio among the large batches."""
    pairs = zip(_cells(results, page_bytes, ours), _cells(results, page_bytes, reference), strict=False)
    ratios = [results.ratio(cell, limit) for cell, limit in pairs if cell.batch >= _LARGE_BATCH_MIN]
    return min(ratios, default=None)


def _best_ratio(results: Results, page_bytes: int, ours: str, theirs: tuple[str, ...]) -> float | None:
    """Returns the ratio of our best batch to their best batch."""
    our_best = results.best(_cells(results, page_bytes, ours))
    their_best = results.best([cell for name in theirs for cell in _cells(results, page_bytes, name)])
    return results.ratio(our_best, their_best) if our_best and their_best else None


def _cells(results: Results, page_bytes: int, verb: str) -> list[Cell]:
    """Returns the cells of one verb, by batch."""
    return sorted(cell for cell in results.samples if (cell.verb, cell.page_bytes) == (verb, page_bytes))


def _latency_us(results: Results, cell: Cell) -> float | None:
    return results.latency_us(cell, 0.5) if cell in results.samples else None
