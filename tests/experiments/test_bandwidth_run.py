"""A small run of the measurement: real processes, every contender of this machine, and the right bytes from each of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.bandwidth.before import compare
from experiments.bandwidth.field import Plan, run_rounds, running_field
from experiments.bandwidth.lane import Start
from experiments.bandwidth.match import over_the_wire
from experiments.bandwidth.pages import Shape
from experiments.bandwidth.processes import ROOT, Child, ChildEnded
from experiments.bandwidth.results import PAGE_BYTES_SMALL
from tests.samples import eventually

ALWAYS = {"memcpy", "raw_tcp", "grpc_bare", "grpc", "tcp", "redis_get", "redis_mget", "redis_set"}


def plan(rounds: int, mooncake_python: Path | None = None) -> Plan:
    return Plan(Shape(PAGE_BYTES_SMALL, 8), (1, 8), rounds, seconds=0.001, budget_s=60.0, mooncake_python=mooncake_python)


@pytest.mark.slow
def test_one_run_has_limits_ours_and_a_peer_in_every_cell() -> None:
    results, notes = run_rounds(plan(rounds=2), lambda _: None)
    rows = results.rows()
    assert {row["transport"] for row in rows} >= ALWAYS
    assert {(row["op"], row["batch"]) for row in rows if row["transport"] == "tcp"} == {
        ("read", 1),
        ("read", 8),
        ("write", 1),
        ("write", 8),
    }
    for row in rows:
        assert row["gb_per_s"] > 0
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert all(len(samples) == 2 for samples in results.samples.values())
    assert any("mooncake" in note for note in notes)


@pytest.mark.slow
def test_a_peer_that_cannot_run_is_named_and_left_out(tmp_path: Path) -> None:
    absent = tmp_path / "bin" / "python"
    with running_field(plan(rounds=1, mooncake_python=absent)) as field:
        assert any("mooncake" in note for note in field.notes)
        assert "tcp read" in field.lane_of_verb


@pytest.mark.slow
def test_look_ups_are_measured_while_another_process_reads() -> None:
    idle, busy = over_the_wire(seconds=0.05)
    assert idle.hashes == busy.hashes == 512


@pytest.mark.slow
def test_another_checkout_takes_turns_with_this_one() -> None:
    found = compare(ROOT, Shape(PAGE_BYTES_SMALL, 8), (1, 8), rounds=2, seconds=0.001)
    ours = {"grpc read", "grpc write", "tcp read", "tcp write"}
    assert {cell.verb for cell in found.samples} >= ours | {f"before:{verb}" for verb in ours}
    assert all(len(samples) == 2 for samples in found.samples.values())


def test_a_lane_answers_until_its_pipe_closes() -> None:
    with Child.of_module("experiments.bandwidth.lanes.memcpy", Start(PAGE_BYTES_SMALL, 4).to_argument()) as lane:
        assert json.loads(lane.first_line()) == ["memcpy read"]
        answer = json.loads(lane.ask(json.dumps({"verb": "memcpy read", "batch": 4, "seconds": 0.001})))
        assert answer["bytes"] == len(answer["ns"]) * 4 * PAGE_BYTES_SMALL
    assert lane.process.returncode == 0


def test_a_lane_that_ends_early_is_an_error_that_names_it() -> None:
    child = Child.of_module("experiments.bandwidth.lanes.memcpy", "not json")
    with child, pytest.raises(ChildEnded, match="memcpy"):
        child.first_line()


_PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


def test_a_child_that_takes_too_long_is_killed_with_the_processes_that_it_has_started() -> None:
    with Child([sys.executable, "-c", _PARENT]) as child:
        grandchild = Path("/proc") / child.first_line() / "stat"
        with pytest.raises(ChildEnded):
            child.ask_within(0.1, "no answer comes")
        assert eventually(lambda: not grandchild.exists() or ") Z " in grandchild.read_text())
