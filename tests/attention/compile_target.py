"""GPU targets: their limits, and the resources of a kernel that is compiled for one of them without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES_MAX = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program may use: CUDA's programming guide, table of compute capabilities; CDNA 3's local data share."""

REGISTERS_MAX = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
REGISTER_FILE = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 4 * 512 * 64}
"""Registers of one multiprocessor or compute unit: a program that needs more cannot start."""


def assert_fits(target: str, report: dict[str, Any]) -> None:
    """report: as from `resources`. No register may be spilled."""
    assert report["shared_bytes"] <= SHARED_BYTES_MAX[target], report
    assert 0 < report["registers"] <= REGISTERS_MAX[target], report
    assert report["registers"] * report["threads"] <= REGISTER_FILE[target], report
    assert report["spilled"] == 0, report


def resources(target: str, source: ASTSource, **options: int) -> dict[str, Any]:
    """Compiles one kernel and reports its name, threads, shared memory in bytes, registers per thread and spilled registers."""
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in binary.asm:
        registers, spilled = _cubin_registers(binary.asm["cubin"])
    else:
        registers, spilled = (
            max(int(count) for count in re.findall(rf"\.{name}:\s*(\d+)", binary.asm["amdgcn"]))
            for name in ("vgpr_count", "vgpr_spill_count")
        )
    return {
        "kernel": source.name,
        "threads": binary.metadata.num_warps * TARGETS[target].warp_size,
        "shared_bytes": binary.metadata.shared,
        "registers": registers,
        "spilled": spilled,
    }


def _cubin_registers(cubin: bytes) -> tuple[int, int]:
    """Returns registers per thread, and bytes of stack (spills), as reported by the tools that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", usage)[-1]), int(re.findall(r"STACK:(\d+)", usage)[-1])
