"""The experiment on the relay runs, and reports the profile's figures with the measured ones."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.relay import main


def test_the_relay_never_passes_more_than_its_profile_asks(tmp_path: Path) -> None:
    assert main(["--profiles", "10m@20ms", "--rounds", "1", "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["profile"], row["asked_gbit_per_s"], row["asked_rtt_ms"]) == ("10m@20ms", 0.01, 20.0)
    # Never faster than the profile; how much slower depends on the machine.
    assert 0 < row["gbit_per_s"] <= 0.0102
    assert row["rtt_ms"] >= 20
