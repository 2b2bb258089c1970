"""Compiles every Triton kernel for one GPU target, with no GPU, and prints the resources of each: `python compile_target.py sm_90`.

A program of its own, because the tests of the kernels' results run under the interpreter, which replaces the compiler.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnstore.attention import triton_kernels
from attnstore.attention.triton import COPY_WORDS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNED = [["tt.divisibility", 16]]
ATTEND = {
    "query": "*bf16",
    "pool": "*bf16",
    "block_tables": "*i32",
    "context_lens": "*i32",
    "query_starts": "*i32",
    "query_positions": "constexpr",
    "sinks": "*fp32",
    "outs": "*fp32",
    "lses": "*fp32",
    "seqs": "i32",
    "total_q": "i32",
    "q_heads": "i32",
    "max_blocks": "i32",
    "block_stride": "i64",
    "layer_at": "i32",
    "factor": "fp32",
    "cap_log2e": "fp32",
    "sliding_window": "i32",
}
MERGE = {"outs": "*fp32", "lses": "*fp32", "out": "*bf16", "lse": "*fp32", "states": "i32", "splits": "i32"}
COPY = {
    "source": "*bf16",
    "target": "*bf16",
    "source_ids": "*i32",
    "target_ids": "constexpr",
    "source_stride": "i64",
    "target_stride": "i64",
    "words": "i32",
}


def compiled(target: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """Compiles one kernel for these types, with pointers and strides that are aligned. Returns its `resources`."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind == "i64" or name == "layer_at"]
    attributes = {(kernel.arg_names.index(name),): ALIGNED for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return resources(target, source, **options) | {"constants": {name: str(value) for name, value in constants.items()}}


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


def main(target: str) -> None:
    """Prints one JSON object per line: attention with all modifications of scores, which need the most registers, in every
    configuration, and without them in the first.
    """
    tiles = ((64, 16), (64, 64), (128, 16), (128, 64), (256, 16))
    for (head_dim, block_m), scored in itertools.product(tiles, (False, True)):
        configs = triton_kernels.configs_for(block_m, head_dim)
        for config in configs if scored else configs[:1]:
            constants = {
                "query_positions": None,
                "GROUP": 4,
                "HEAD_DIM": head_dim,
                "BLOCK_TOKENS": 16,
                "HAS_POSITIONS": False,
                "HAS_WINDOW": scored,
                "HAS_CAP": scored,
                "HAS_SINKS": scored,
                "COMPUTE": tl.bfloat16,
                "BLOCK_M": block_m,
                "BLOCK_D": head_dim,
                **config.kwargs,
            }
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            print(json.dumps(compiled(target, triton_kernels.attend.fn, ATTEND, constants, **options)))
    print(json.dumps(compiled(target, triton_kernels.merge_splits, MERGE, {"HEAD_DIM": 128, "BLOCK_D": 128})))
    print(json.dumps(compiled(target, triton_kernels.copy_pages, COPY, {"target_ids": None, "BLOCK": COPY_WORDS})))


if __name__ == "__main__":
    main(sys.argv[1])
