"""The measurement of penalties: resumable rows, bounds judged by them, and one small real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnstore.links import parse_link
from experiments.penalty.__main__ import main
from experiments.penalty.claims import claims
from experiments.penalty.grid import FULL, QUICK, Grid, LinkCell
from experiments.penalty.results import Results
from experiments.report.rows import read_results

COMMON = {"machine": "test", "seed": 3}
SMALL = Grid(
    rtts_ms=(2.0,),
    gbits_per_s=(1.0,),
    contexts_tokens=(256,),
    hit_rates=(1.0, 0.5),
    rounds=1,
    once_s=8.0,
    halves_gbit_per_s=0.1,
    faults=((LinkCell(1.0, 1.0), 512),),
    decodes=((LinkCell(1.0, 1.0), 256),),
)


def row(recompute: float, fetch: float, planner: float, predicted: float) -> dict[str, Any]:
    times = {"recompute_ttft_ms": recompute, "fetch_ttft_ms": fetch, "planner_ttft_ms": planner, "predicted_ttft_ms": predicted}
    return {"rtt_ms": 1.0, "gbit_per_s": 1.0, "context_tokens": 512, "hit_rate": 1.0, "choice": "meet", **times}


@pytest.mark.parametrize("grid", [FULL, QUICK])
def test_every_link_of_a_grid_can_be_spelled_for_the_relay(grid: Grid) -> None:
    for link in grid.links():
        profile = parse_link(link.spec)
        assert profile.rtt_ms == link.rtt_ms
        assert profile.down_bits_per_s == pytest.approx(link.gbit_per_s * 1e9)


def test_the_full_grid_covers_what_is_to_be_shown() -> None:
    assert (min(FULL.gbits_per_s), max(FULL.gbits_per_s)) == (0.01, 10.0)
    assert (min(FULL.rtts_ms), max(FULL.rtts_ms)) == (0.0, 50.0)
    assert (min(FULL.contexts_tokens), max(FULL.contexts_tokens)) == (512, 6000)
    assert (len(QUICK.rtts_ms), len(QUICK.gbits_per_s)) == (3, 3)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Results(path, COMMON, resume=False)
    first.add(**row(100, 200, 90, 95))
    resumed = Results(path, COMMON, resume=True)
    assert resumed.has(rtt_ms=1.0, gbit_per_s=1.0, context_tokens=512, hit_rate=1.0)
    assert not resumed.has(rtt_ms=1.0, gbit_per_s=1.0, context_tokens=512, hit_rate=0.5)
    assert resumed.rows[0]["machine"] == "test"
    assert Results(path, COMMON, resume=False).rows == []


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([row(100, 200, 109, 109), row(100, 110, 70, 70)], ["met", "met", "met"]),
        ([row(100, 200, 111, 111), row(100, 110, 90, 90)], ["MISSED", "MISSED", "met"]),
        ([row(100, 200, 50, 80), row(100, 200, 50, 80)], ["met", "met", "MISSED"]),
    ],
)
def test_bounds_are_judged_by_the_rows(rows: list[dict[str, Any]], verdicts: list[str]) -> None:
    assert list(claims(rows).columns[3].cells) == verdicts


@pytest.mark.slow
def test_a_small_real_run_gives_rows_that_the_report_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.penalty.__main__.QUICK", SMALL)
    path = tmp_path / "rows.jsonl"
    assert main(["--json", str(path), "--quick"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 + 2 + 3
    sweep = [each for each in rows if "fetch_ttft_ms" in each]
    assert {each["hit_rate"] for each in sweep} == {1.0, 0.5}
    assert all(each["decisions"][0]["happened_ttft_ms"] for each in sweep)
    results = read_results([path])
    assert len(results.first_tokens) == 2
    assert {fault.fault for fault in results.faults} == {"rate/100", "stall"}
    assert {decode.residence for decode in results.decodes} == {"resident", "fetched", "prefetched"}
