"""The Triton backend: its results under the interpreter (and on a GPU if there is one), and compilation for real GPUs.

Each in a process of its own, because Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

SHARED_BYTES_MAX = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program may use: CUDA's programming guide, table of compute capabilities; CDNA 3's local data share."""

REGISTERS_MAX = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
REGISTER_FILE = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 4 * 512 * 64}
"""Registers of one multiprocessor or compute unit: a program that needs more cannot start."""

SPILLED_MAX = {"sm_80": 0, "sm_90": 0, "sm_100": 8, "gfx942": 0}
"""For sm_100 ptxas keeps two registers of the windowed kernel (128 dimensions, 16 rows, 32 keys) on the stack: 8 bytes beside 80
registers of 255."""


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


def assert_fits(target: str, report: dict[str, Any]) -> None:
    """report: as from `compile_target.resources`."""
    assert report["shared_bytes"] <= SHARED_BYTES_MAX[target], report
    assert 0 < report["registers"] <= REGISTERS_MAX[target], report
    assert report["registers"] * report["threads"] <= REGISTER_FILE[target], report


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Returns what the compilation for each target reported. A compiler uses one core, so as many run at once."""

    def compile_for(target: str) -> subprocess.CompletedProcess[str]:
        cache = str(tmp_path_factory.mktemp(target))
        return run(["tests.attention.compile_target", target], TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="1")

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        return dict(zip(SHARED_BYTES_MAX, compilers.map(compile_for, SHARED_BYTES_MAX), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(SHARED_BYTES_MAX))
def test_every_kernel_compiles_for_the_target_and_fits_it(
    target: str, compiled: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = compiled[target]
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == {"attend", "merge_splits", "copy_pages"}
    for report in reports:
        assert_fits(target, report)
        assert report["spilled"] <= SPILLED_MAX[target], report
