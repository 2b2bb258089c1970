"""Each wait of a device is noticed if it is left out."""

from __future__ import annotations

import json
from pathlib import Path

from attnstore_worker.device.base import Wait
from experiments.device_faults.__main__ import main


def test_every_wait_that_is_left_out_is_noticed_and_nothing_races_with_all_of_them(tmp_path: Path) -> None:
    assert main(["--quick", "--json", str(tmp_path / "faults.json")]) == 0
    report = json.loads((tmp_path / "faults.json").read_text())
    assert report["waits"] == report["caught"] == [wait.name for wait in Wait]
    assert len(report["caught"]) >= 12
    assert report["schedules"] == ["early", "late"]
    assert (report["unsynchronised"], report["failed"]) == (0, [])
    assert {(notice["wait"], notice["schedule"]) for notice in report["notices"]} == {
        (wait, schedule) for wait in report["waits"] for schedule in report["schedules"]
    }
