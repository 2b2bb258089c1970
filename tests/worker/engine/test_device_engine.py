"""The engine on a device that uses Triton, in a process of its own: Triton decides at import whether kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_interpreted_kernels_the_engine_gives_the_cpus_tokens() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/worker/engine/device_engine_checks.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
