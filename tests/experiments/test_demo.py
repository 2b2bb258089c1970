"""The demonstration in a reduced form: a tiny model, but real processes and a real node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.demo import main


def test_the_demonstration_writes_its_figures_and_the_tokens_are_equal(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures_file = tmp_path / "demo.json"
    options = ["--model", str(tiny_folder), "--prompt-tokens", "300", "--max-tokens", "8", "--capacity", "64MiB"]
    assert main([*options, "--json", str(figures_file)]) == 0
    figures = json.loads(figures_file.read_text())
    assert list(figures) == [
        "prompt_tokens",
        "hit_tokens",
        "ttft_cold_ms",
        "ttft_warm_ms",
        "ttft_control_ms",
        "speedup",
        "bytes_read",
        "tokens_equal",
        "kv_bytes_used",
        "kv_bytes_contiguous",
    ]
    assert figures["tokens_equal"] is True
    assert (figures["prompt_tokens"], figures["hit_tokens"]) == (300, 288)
    assert figures["bytes_read"] == 288 // 16 * 16_384
    assert figures["kv_bytes_used"] < figures["kv_bytes_contiguous"]
    shown = capsys.readouterr().out
    assert "TTFT warm" in shown
    assert "contiguous reservation" in shown
