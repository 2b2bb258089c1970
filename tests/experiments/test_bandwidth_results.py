"""The arithmetic of the measurement: figures, ratios and verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bandwidth.claims import claims
from experiments.bandwidth.lane import Sample, Start, measure
from experiments.bandwidth.match import in_the_table
from experiments.bandwidth.pages import PageBuffers, Shape, expected
from experiments.bandwidth.plot import save_plot
from experiments.bandwidth.report import match_table, pivot, table
from experiments.bandwidth.results import Cell, Results, quantile_us

PAGE_BYTES = 368_640


def sample(gb_per_s: float) -> Sample:
    return Sample(ns=[round(PAGE_BYTES / gb_per_s)], bytes=PAGE_BYTES, client_ns=100, server_ns=200)


def results(**series: list[float]) -> Results:
    found = Results()
    for verb, speeds in series.items():
        transport, op = verb.rsplit("_", 1)
        for speed in speeds:
            found.add(Cell(transport, op, PAGE_BYTES, 32), sample(speed))
    return found


class CountingLane:
    """A lane that only records its calls."""

    landing: dict[str, PageBuffers] = {}  # noqa: RUF012 - the contract asks for a mapping, and this one has none

    def __init__(self) -> None:
        self.moved: list[tuple[int, int]] = []
        self.passes = 0
        self.verbs = {"counting write": self._move}

    def begin_pass(self) -> None:
        self.passes += 1

    def _move(self, begin: int, end: int) -> None:
        self.moved.append((begin, end))


@pytest.mark.parametrize(("quantile", "microseconds"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_quantile_is_a_duration_that_was_measured(quantile: float, microseconds: float) -> None:
    assert quantile_us(range(1_000, 101_000, 1_000), quantile) == microseconds


def test_a_figure_is_the_median_over_rounds_and_a_ratio_the_median_of_the_rounds_ratios() -> None:
    found = results(tcp_read=[2.0, 0.2, 3.0], raw_tcp_read=[4.0, 0.4, 4.0])
    tcp, raw = Cell("tcp", "read", PAGE_BYTES, 32), Cell("raw_tcp", "read", PAGE_BYTES, 32)
    assert found.gb_per_s(tcp) == pytest.approx(2.0, rel=1e-4)
    # The slow second round affected both alike; a ratio of medians would be the same only by accident.
    assert found.ratio(tcp, raw) == pytest.approx(0.5, rel=1e-4)


def test_a_claim_is_judged_by_its_worst_batch_and_not_at_all_without_its_contenders() -> None:
    verdicts = {
        claim.text: claim.verdict
        for claim in claims(results(tcp_read=[4.0], raw_tcp_read=[4.1], tcp_write=[1.0], raw_tcp_write=[4.0]))
    }
    assert verdicts["368,640 B: tcp read over raw TCP, batch >= 32"] == "met"
    assert verdicts["368,640 B: tcp write over raw TCP, batch >= 32"] == "MISSED"
    assert verdicts["368,640 B: tcp read over Mooncake's best get"] == "not measured"


def test_a_lane_is_timed_batch_after_batch_and_told_of_every_pass() -> None:
    lane = CountingLane()
    found = measure(lane, Start(page_bytes=256, pages=5), "counting write", batch=2, seconds=0.01)
    assert lane.moved[:3] == [(0, 2), (2, 4), (0, 2)]
    assert lane.passes == -(-len(lane.moved) // 2)
    assert found.bytes == len(found.ns) * 2 * 256
    assert found.server_ns == 0


def test_every_page_has_bytes_of_its_own() -> None:
    shape = Shape(page_bytes=1024, pages=300)
    assert len({bytes(view) for view in PageBuffers.filled(shape).views}) == shape.pages
    assert len(expected(7, shape.page_bytes)) == shape.page_bytes


def test_tables_line_up_and_hold_every_row() -> None:
    rows = results(tcp_read=[4.0], raw_tcp_read=[4.1]).rows()
    for text in (table(rows), pivot(rows)):
        assert len({len(line) for line in text.splitlines()}) == 1
        assert text.index("raw_tcp") < text.index("| tcp"), "limits come first"


def test_look_ups_are_measured_in_a_table_smaller_than_the_prompt() -> None:
    figures = in_the_table((10, 100), (1, 50), seconds=0.001)
    assert [(figure.table_pages, figure.hashes) for figure in figures] == [(10, 1), (10, 50), (100, 1), (100, 50)]
    assert all(0 < figure.p50_us <= figure.p99_us for figure in figures)
    assert "page table" in match_table(figures)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    save_plot(results(tcp_read=[4.0], raw_tcp_read=[4.1], tcp_write=[2.0], memcpy_read=[7.0]).rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
