"""The checking wrapper and the factory: which calls are refused, without needing a backend."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from attnstore.attention import create_attention
from attnstore.errors import InvalidArgument

INT = torch.int32


def valid() -> dict[str, Any]:
    return {
        "query": torch.zeros(2, 6, 64),
        "pool": torch.zeros(8, 2, 2, 3, 16, 64),
        "block_tables": torch.zeros(2, 4, dtype=INT),
        "context_lens": torch.tensor([40, 16], dtype=INT),
        "query_starts": torch.tensor([0, 1, 2], dtype=INT),
        "layer": 1,
        "scale": 0.125,
    }


def test_the_valid_call_is_accepted() -> None:
    create_attention("reference").paged_attention(**valid())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(2, 6 * 64)),
        ("query", torch.zeros(2, 6, 64, dtype=torch.float64)),
        ("query", torch.zeros(2, 6, 32)),
        ("query", torch.zeros(2, 7, 64)),
        ("query", torch.zeros(3, 6, 64)),
        ("pool", torch.zeros(8, 2, 3, 16, 64)),
        ("pool", torch.zeros(0, 2, 2, 3, 16, 64)),
        ("pool", torch.zeros(8, 2, 2, 3, 16, 64, dtype=torch.uint8)),
        ("pool", torch.zeros(8, 2, 2, 16, 3, 64).transpose(3, 4)),
        ("pool", torch.zeros(1, 2, 2, 3, 16, 64).expand(8, -1, -1, -1, -1, -1)),
        ("block_tables", torch.zeros(2, 4, dtype=torch.int64)),
        ("block_tables", torch.zeros(8, dtype=INT)),
        ("block_tables", torch.full((2, 4), 8, dtype=INT)),
        ("block_tables", torch.full((2, 4), -1, dtype=INT)),
        ("context_lens", torch.tensor([40], dtype=INT)),
        ("context_lens", torch.tensor([65, 16], dtype=INT)),
        ("context_lens", torch.tensor([-1, 16], dtype=INT)),
        ("query_starts", torch.tensor([0, 2], dtype=INT)),
        ("query_starts", torch.tensor([1, 1, 2], dtype=INT)),
        ("query_starts", torch.tensor([0, 3, 2], dtype=INT)),
        ("query_starts", torch.tensor([0, 1, 1], dtype=INT)),
        ("query_positions", torch.zeros(3, dtype=INT)),
        ("query_positions", torch.zeros(2, dtype=torch.int64)),
        ("layer", 2),
        ("layer", -1),
        ("scale", float("nan")),
        ("sliding_window", 0),
        ("sliding_window", 1 << 31),
        ("soft_cap", 0.0),
        ("soft_cap", -50.0),
        ("soft_cap", float("nan")),
        ("soft_cap", float("inf")),
        ("soft_cap", 1e-30),
        ("soft_cap", 1e6),
        ("sinks", torch.zeros(3)),
        ("sinks", torch.zeros(1, 6)),
        ("sinks", torch.zeros(6, dtype=torch.bfloat16)),
        ("sinks", torch.zeros(12)[::2]),
        ("sinks", torch.zeros(6, device="meta")),
        ("sinks", torch.tensor([0.0, 0, 0, 0, 0, torch.nan])),
        ("sinks", torch.tensor([0.0, 0, 0, 0, 0, -torch.inf])),
        ("out_dtype", torch.int32),
    ],
)
def test_a_malformed_argument_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=name if name != "query" else "query|head"):
        create_attention("reference").paged_attention(**{**valid(), name: value})


def test_unused_entries_of_a_table_may_be_anything() -> None:
    call = valid()
    call["block_tables"][1, 1:] = -7
    create_attention("reference").paged_attention(**call)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cpu, reference, triton"):
        create_attention("cuda")  # type: ignore[arg-type]


def test_importing_the_package_loads_neither_triton_nor_numba() -> None:
    code = "import sys, attnstore.attention as a; a.create_attention('reference'); print({'triton', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
