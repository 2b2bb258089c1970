"""The model on a device with Triton: interpreted here, compiled on a GPU if there is one; and without numba.

Each in a process of its own, because Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.attention.test_triton import run

CHECKS = "tests/worker/model/triton_model_checks.py"


def test_the_interpreted_model_agrees_with_the_cpus() -> None:
    done = run(["pytest", "-q", CHECKS], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_compiled_model_agrees_with_the_cpus() -> None:
    done = run(["pytest", "-q", CHECKS])
    assert done.returncode == 0, done.stdout


def test_a_worker_on_a_device_needs_no_numba(tiny_folder: Path) -> None:
    done = run(["tests.worker.model.without_numba", str(tiny_folder)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
