"""`attnstore spill check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnstore.cli import main
from attnstore.spill.device import DirectoryDevice
from attnstore.spill.format import BLOCK_BYTES, SegmentHeader
from tests.spill.pages import opened, store


def test_a_whole_directory_is_reported_and_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = opened(DirectoryDevice(tmp_path))
    disk.delete([store(disk, range(9))[0]])
    disk.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["spill", "check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pages"], report["deleted_pages"], report["damaged_pages"], report["is_whole"]) == (8, 1, 0, True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["spill", "check", str(tmp_path)]) == 0
    assert "8 intact" in capsys.readouterr().out


def test_a_damaged_page_is_counted_and_sets_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = opened(DirectoryDevice(tmp_path))
    store(disk, range(3))
    disk.close()
    path = tmp_path / "segment-0000000"
    data = bytearray(path.read_bytes())
    header = SegmentHeader.decode(bytes(data[:BLOCK_BYTES]))
    assert header is not None
    data[header.record_offset_bytes(1) + BLOCK_BYTES] ^= 1
    path.write_bytes(data)
    assert main(["spill", "check", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["pages"], report["damaged_pages"], report["is_whole"]) == (2, 1, False)


def test_a_directory_in_use_or_without_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = opened(DirectoryDevice(tmp_path / "used"))
    assert main(["spill", "check", str(tmp_path / "used")]) == 2
    assert "another node uses it" in capsys.readouterr().err
    disk.close()
    assert main(["spill", "check", str(tmp_path)]) == 2
    assert main(["spill", "check", str(tmp_path / "nowhere")]) == 2
