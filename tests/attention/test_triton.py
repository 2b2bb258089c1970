"""The results of the Triton backend under the interpreter, and on a GPU if there is one.

Each in a process of its own, because Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment, cwd=ROOT, check=False)


def test_interpreted_kernels_agree_with_the_reference() -> None:
    done = run(["pytest", "-q", "tests/attention/triton_kernels_checks.py"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_agree_with_the_reference() -> None:
    done = run(["pytest", "-q", "tests/attention/triton_kernels_checks.py"])
    assert done.returncode == 0, done.stdout
