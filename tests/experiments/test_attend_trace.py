"""The timelines, the pings and the forecasts of the attend experiment."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from attnstore_worker.model import LoadedModel
from experiments.attend import timeline
from experiments.attend.notes import Notes
from experiments.attend.ping import measured_rtt_ms
from experiments.attend.predicate import WAYS, Predicted, median_error, predict, regret, table
from experiments.attend.real_model import Cell, documents
from experiments.attend.timeline import Layer, Timeline

DIRECT = Cell(0.0, math.inf, ("attend",), 8, 2)


def test_notes_are_taken_until_the_end_and_also_of_calls_that_raise() -> None:
    class Owner:
        def call(self, fails: bool) -> int:
            if fails:
                raise KeyError
            return 7

    notes, owner = Notes(), Owner()
    notes.take(Owner, "call", "a call")
    assert owner.call(False) == 7
    with pytest.raises(KeyError):
        owner.call(True)
    notes.end()
    owner.call(False)
    assert len(notes.of("a call")) == 2
    assert all(began_s <= ended_s for began_s, ended_s in notes.of("a call"))


def layer_at(start_s: float) -> Layer:
    """A layer of 1,000 us of products, then 200 from the query to the merge, of which the node computes for 60."""

    def at(first_us: float, last_us: float) -> tuple[float, float]:
        return start_s + first_us / 1e6, start_s + last_us / 1e6

    return Layer(
        weights=at(0, 1000),
        ask=at(1000, 1020),
        attend_here=at(1020, 1050),
        receive=at(1050, 1190),
        merge=at(1195, 1200),
        query=at(1060, 1160),
        answer=at(1070, 1150),
        compute=at(1080, 1140),
    )


def test_the_parts_of_a_layer_follow_from_its_intervals() -> None:
    parts = layer_at(5.0).parts_us(rtt_ms=0.05)
    assert parts["link: to the node"] == pytest.approx(40, abs=0.01)
    assert parts["node: compute"] == pytest.approx(60, abs=0.01)
    assert parts["from the query to the merged result"] == pytest.approx(200, abs=0.01)
    assert parts["beside computing and the link"] == pytest.approx(200 - 60 - 50, abs=0.01)


def test_a_trace_has_complete_events_of_both_sides(tmp_path: Path) -> None:
    shown = Timeline(DIRECT, 512, 0.05, [layer_at(0.0), layer_at(0.0012)])
    timeline.write([shown], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 8
    assert all(event["dur"] > 0 for event in spans)
    assert shown.medians_us()["worker: merge"] == pytest.approx(5, abs=0.01)
    assert timeline.table([shown]).row_count == len(shown.medians_us())


@pytest.mark.slow
def test_both_sides_note_every_layer_of_the_traced_steps(model: LoadedModel) -> None:
    [prose] = documents(model, 96, 1, repeating=False)
    [traced] = timeline.trace(model, prose, [DIRECT], threads=1)
    assert len(traced.layers) == 16 * 30
    for layer in traced.layers:
        order = (
            layer.weights[1],
            layer.ask[0],
            layer.answer[0],
            layer.compute[0],
            layer.compute[1],
            layer.receive[1],
            layer.merge[1],
        )
        assert all(first <= second for first, second in pairwise(order))


def test_a_ping_through_a_link_takes_its_round_trip() -> None:
    assert 0 < measured_rtt_ms(None, 0) < measured_rtt_ms("10g@2ms", 1 << 16)
    assert measured_rtt_ms("10g@2ms", 0) >= 2


def test_regret_is_what_the_forecast_choice_cost_over_the_best() -> None:
    def cell(context: int, *times: tuple[float, float]) -> list[Predicted]:
        return [Predicted(context, 0.1, 1.0, way, 8, *both) for way, both in zip(WAYS, times, strict=True)]

    right, wrong = cell(512, (90, 100), (200, 220), (300, 300)), cell(1024, (110, 120), (100, 150), (300, 300))
    assert regret(right) == 1
    assert regret([*right, *wrong]) == 150 / 120
    assert median_error(right) == pytest.approx(20 / 220)
    assert table(wrong).row_count == 3


@pytest.mark.slow
def test_a_planner_that_was_taught_by_one_document_forecasts_another(model: LoadedModel) -> None:
    known, asked = documents(model, 96, 2, repeating=False)
    rows = predict(model, known, asked, [DIRECT], threads=1)
    assert [row.way for row in rows] == list(WAYS)
    assert all(0 < row.forecast_ms < math.inf and row.measured_ms > 0 for row in rows)
