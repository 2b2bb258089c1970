"""The proof and the measurements of a GPU, on a simulated device: every phase but its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.gpu.__main__ import main
from experiments.gpu.report import picture, table
from experiments.gpu.results import AT_LEAST, AT_MOST, Figure, Rows, Target, ceiling, read_rows
from experiments.gpu.targets import PHASES
from experiments.gpu.wheels import wanted

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_phase_runs_on_a_simulated_device_and_every_check_is_right(tmp_path: Path) -> None:
    status = main(["--out", str(tmp_path), "--device", "simulated", "--quick", "--deadline", "2000"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    checks = [row for phase in found["phases"].values() for row in phase["rows"] if row["kind"] == "check"]
    assert [row for row in checks if not row["ok"]] == []
    assert {name: phase["state"] for name, phase in found["phases"].items()} == dict.fromkeys(PHASES, "passed")
    assert status == 0
    assert len(checks) > 40
    assert not [row for phase in found["phases"].values() for row in phase["rows"] if row["kind"] == "figure"]
    assert f"{len(checks)} of {len(checks)} checks were right" in (tmp_path / "gpu.md").read_text()


def test_a_device_that_is_not_there_fails_every_phase_and_says_why(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--device", "cuda:99", "--phases", "versions"]) == 1
    [row] = read_rows(tmp_path, "versions")
    assert "cuda:99 cannot be used" in row["detail"]


def test_rows_are_on_disk_at_once_and_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    rows = Rows(tmp_path, "ceilings")
    rows.figure(Figure("hbm_read", 4000.0, "GB/s"))
    rows.check("right", ok=True)
    rows.check("wrong", ok=False)
    assert rows.failed == 1
    with (tmp_path / "ceilings.jsonl").open("a") as file:
        file.write('{"kind": "fig')
    assert [row["name"] for row in read_rows(tmp_path, "ceilings")] == ["hbm_read", "right", "wrong"]
    assert ceiling(tmp_path, "hbm_read") == 4000.0
    assert ceiling(tmp_path, "matmul") is None


@pytest.mark.parametrize(("target", "met", "missed"), [(Target(AT_LEAST, 0.8), 0.8, 0.79), (Target(AT_MOST, 1.05), 1.05, 1.06)])
def test_a_target_is_met_on_its_side(target: Target, met: float, missed: float) -> None:
    assert Figure("x", 1.0, "ms", "y", met, target).is_met
    assert not Figure("x", 1.0, "ms", "y", missed, target).is_met
    assert Figure("x", 1.0, "ms").is_met is None


def test_the_table_and_the_picture_show_each_ratio_with_its_target(tmp_path: Path) -> None:
    rows = Rows(tmp_path, "copies")
    rows.figure(Figure("up", 50.0, "GB/s", "pinned_up", 0.97, Target(AT_LEAST, 0.95)))
    rows.figure(Figure("down", 10.0, "GB/s", "pinned_down", 0.2, Target(AT_LEAST, 0.95)))
    found = {"phases": {"copies": {"state": "passed", "rows": read_rows(tmp_path, "copies")}}}
    text = table(found)
    assert "| up | 50 GB/s | 0.970 of pinned_up | >= 0.95 | met |" in text
    assert "| down | 10 GB/s | 0.200 of pinned_down | >= 0.95 | not met |" in text
    picture(found, tmp_path / "gpu.svg")
    assert "<svg" in (tmp_path / "gpu.svg").read_text()


def test_the_wheels_are_what_a_node_and_a_worker_need_beside_torch() -> None:
    names = {requirement.partition(">")[0] for requirement in wanted(ROOT / "pyproject.toml")}
    assert {"grpcio", "protobuf", "pydantic", "starlette", "uvicorn", "gguf"} <= names
    assert not names & {"torch", "triton", "transformers", "numpy", "numba"}
