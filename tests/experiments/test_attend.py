"""The attend experiment: its formula, and a small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnstore_worker.model import LoadedModel
from experiments.attend.__main__ import _as_json
from experiments.attend.real_model import Cell, documents, measure
from experiments.attend.rows import MODES, Row, attend_ms, fetch_ms, table
from experiments.attend.synthetic import Geometry, measure_geometry

TINY = Geometry("tiny", layers=6, q_heads=4, kv_heads=2, head_dim=64, stored_layers=2)


def test_the_formula_counts_a_round_trip_a_layer_and_the_bytes_of_a_token() -> None:
    assert attend_ms(50.0, 30, 0.1, 139_320, 1.0) == pytest.approx(50 + 3 + 1.11456)
    assert fetch_ms(50.0, 125_000_000, 0.1, 1.0) == pytest.approx(50 + 0.1 + 1000)


def test_synthetic_pages_give_rows_whose_bytes_do_not_depend_on_the_context() -> None:
    rows: list[Row] = []
    for context in (256, 1024):
        rows += measure_geometry(TINY, context, [(0.0, 10.0)], 1, threads=1, repeats=2)
    rows += measure_geometry(TINY, 1024, [(0.0, 10.0)], 2, threads=1, repeats=2)
    attended = [row for row in rows if row.mode == "attend"]
    assert [row.nodes for row in attended] == [1, 1, 2]
    assert attended[0].bytes_per_token == attended[1].bytes_per_token == 6 * 4 * (2 * 4 * 64 + 4)
    assert attended[2].bytes_per_token == 2 * attended[1].bytes_per_token
    assert all(row.round_trips_per_token == 6 for row in attended)
    assert all(row.tpot_ms > 0 for row in rows)
    assert table(rows).row_count == len(rows)


@pytest.mark.slow
def test_every_mode_gives_the_resident_tokens(model: LoadedModel) -> None:
    [listing] = documents(model, 96, 1, repeating=True)
    rows = measure(model, listing, [Cell(0.0, 10.0, MODES[1:], 8, 3)], capacity="128MiB", threads=1)
    assert [row.mode for row in rows] == list(MODES)
    assert all(row.tokens_equal for row in rows)
    by_mode = {row.mode: row for row in rows}
    assert by_mode["attend"].bytes_per_token == pytest.approx(30 * 4 * (2 * 9 * 64 + 9))
    assert by_mode["attend"].round_trips_per_token == 30
    assert by_mode["attend_speculative"].round_trips_per_token <= 30


@pytest.mark.slow
def test_a_context_of_which_half_is_here_gives_the_resident_tokens_too(model: LoadedModel) -> None:
    [prose] = documents(model, 640, 1, repeating=False)
    cell = Cell(2.0, 1.0, ("attend_speculative",), 8, 2, resident_share=0.5)
    resident, half = measure(model, prose, [cell], capacity="256MiB", threads=1)
    assert (resident.resident_share, half.resident_share) == (0.0, 0.5)
    assert half.tokens_equal
    assert 0 < half.round_trips_per_token <= 30
    assert "50% here" in "".join(map(str, table([half]).columns[5].cells))


def test_rows_are_valid_json(tmp_path: Path) -> None:
    row = Row("m", 16, 0.0, float("inf"), "resident", 1, 1.0, None, 0.0, 0.0, None, None, None)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([_as_json(row)], allow_nan=False))
    assert json.loads(path.read_text())[0]["gbit_per_s"] is None
