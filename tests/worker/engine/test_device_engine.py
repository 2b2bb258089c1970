"""The engine on a simulated device, in processes of its own: Triton decides at import whether kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreted kernels", "the processor's kernels"])
def test_the_engine_on_a_device_gives_the_processors_tokens(interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/worker/engine/device_engine_checks.py"],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
