"""The experiments check their options as the commands do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMANDS = [path for path in EXPERIMENTS.rglob("*.py") if "CommandParser(" in path.read_text()]
OTHERS = {"valkey_cli.py"}
"""An option that another program interprets."""


def test_every_experiment_reads_its_options_as_the_commands_do() -> None:
    plain = {path.name for path in EXPERIMENTS.rglob("*.py") if "argparse.ArgumentParser(" in path.read_text()}
    assert plain == OTHERS
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_numbers_have_bounds_and_results_are_known_to_be_writable_before_they_are_measured(path: Path) -> None:
    for added in re.findall(r"add(?:_argument)?\((.*?)\)\n", path.read_text(), re.DOTALL):
        assert not re.search(r"type=float\b", added), added
        assert not re.search(r"type=int\b", added) or "choices=" in added, added
        if re.search(r'"--(?:json|plot|match-json|write)"', added):
            assert "type=file_to_write" in added, added
