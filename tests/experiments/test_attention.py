"""The attention experiment's rows, from a run too short to mean anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import attention

KEYS = {"backend", "phase", "context_tokens", "batch", "gb_per_s", "read_limit_gb_per_s", "contiguous_read_gb_per_s"}


def test_every_row_holds_attention_against_both_reads_of_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "POOL_BYTES", 60_000_000)
    monkeypatch.setattr(attention, "_SECONDS_PER_ROW", {True: 0.0})
    threads = torch.get_num_threads()
    try:
        assert attention.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["backend"], row["phase"]) for row in rows} >= {("cpu", "decode"), ("cpu", "prefill"), ("gather_sdpa", "decode")}
    for row in rows:
        assert row.keys() >= KEYS
        assert min(row["gb_per_s"], row["read_limit_gb_per_s"], row["contiguous_read_gb_per_s"]) > 0
