"""Every Triton kernel of the project as it is launched: compiled once whatever a step looks like, within every target's limits.

Nothing here says by hand what a kernel is compiled for: the code that launches it runs on a device without a GPU, and what Triton
would compile there is compiled for every target.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler import ASTSource

from attnstore.attention import CheckedAttention
from attnstore.attention.triton import (
    TritonAttention,
    gather_pages,
    gather_runs,
    merge_partials,
    scatter_pages,
    scatter_runs,
)
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.random_models import LLAMA_3_8B, SMOLLM2_135M, LlamaShape, empty_llama
from tests.attention.compile_target import TARGETS, assert_fits, resources
from tests.worker.fake_device import CUDA, Launch, fake_cuda
from tests.worker.model.steps import Pages, Spans

ROOT = Path(__file__).parents[3]
PROGRAMS = 528


def decode(lengths: Sequence[int]) -> Spans:
    return [(length - 1, length) for length in lengths]


def launched(run: Callable[[], object]) -> dict[str, Launch]:
    """Returns what Triton compiles for the launches of `run`."""
    with fake_cuda() as launches:
        run()
    return {launch.compiled: launch for launch in launches}


def forward(shape: LlamaShape, steps: Sequence[Spans], dtype: DType = DType.BF16) -> None:
    """Runs the decoder; two layers stand for all."""
    layout = PageLayout(layers=2, kv_heads=shape.kv_heads, head_dim=shape.head_dim, block_tokens=16, dtype=dtype)
    decoder = DeviceLlamaDecoder(empty_llama(shape._replace(layers=2), TORCH_DTYPES[dtype], CUDA))
    for spans in steps:
        pages = Pages.of(layout, [end for _, end in spans], CUDA, vocabulary=shape.vocabulary, content=0.0)
        pages.asked(CheckedAttention(TritonAttention(PROGRAMS)), spans).logits(decoder)


def integers(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32, device=CUDA)


def attend(*, seqs: int, rows: int, max_blocks: int = 64, table_offset: int = 0, **fields: Any) -> None:
    """One call of the attention of Llama-3-8B."""
    tables = [integers(size + table_offset)[table_offset:] for size in (seqs * max_blocks, seqs, seqs + 1)]
    TritonAttention(PROGRAMS).paged_attention(
        torch.empty(seqs * rows, 32, 128, dtype=torch.bfloat16, device=CUDA),
        torch.empty(9, 2, 2, 8, 16, 128, dtype=torch.bfloat16, device=CUDA),
        tables[0].view(seqs, max_blocks),
        *tables[1:],
        layer=1,
        scale=128**-0.5,
        **fields,
    )


def attend_with_scores_modified() -> None:
    for rows in (1, 60):
        attend(seqs=3, rows=rows, sliding_window=4096, soft_cap=50.0, sinks=torch.zeros(32, device=CUDA))


def copy_pages() -> None:
    pool = torch.empty(9, 2, 2, 8, 16, 128, dtype=torch.bfloat16, device=CUDA)
    scatter_pages(gather_pages(pool, integers(3)), integers(3), pool)


def copy_runs() -> None:
    """Of blocks in vLLM's caches."""
    cache, table = torch.empty(1 << 20, dtype=torch.int64, device=CUDA), torch.empty(8, 2, dtype=torch.int64, device=CUDA)
    pages = torch.empty(9, 8 * 64, dtype=torch.int64, device=CUDA)
    for count in (1, 3, 8):
        gather_runs(cache, table, 64, integers(count), pages[:count])
        scatter_runs(cache, table, 64, integers(count + 1)[1:], pages[1 : 1 + count])


def merge_rows() -> None:
    """As for partials of two nodes that attended to some of the rows, and to all of them."""
    out, lse = torch.empty(8, 32, 128, device=CUDA), torch.empty(8, 32, device=CUDA)
    for rows, ids in ((3, integers(3)), (8, None)):
        merge_partials(out, lse, torch.empty(2, rows, 32, 128, device=CUDA), torch.empty(2, rows, 32, device=CUDA), ids)


STEPS = [decode([40, 1000]), [(0, 1000)]]
LAUNCHES: dict[str, Callable[[], None]] = {
    "Llama-3-8B in bf16": lambda: forward(LLAMA_3_8B, STEPS),
    "SmolLM2 in bf16": lambda: forward(SMOLLM2_135M, STEPS),
    "SmolLM2 in fp32": lambda: forward(SMOLLM2_135M, STEPS[:1], DType.FP32),
    "window, cap and sinks": attend_with_scores_modified,
    "copies of pages": copy_pages,
    "copies of runs": copy_runs,
    "partials of store nodes": merge_rows,
}
"""Code that launches kernels. A new kernel is launched here too."""


def test_every_kernel_is_launched_here() -> None:
    sources = [path.read_text() for folder in ("attnstore", "worker") for path in (ROOT / folder).rglob("*.py")]
    functions = [each for source in sources for each in re.split(r"^@triton\.jit", source, flags=re.MULTILINE)[1:]]
    kernels = {re.findall(r"^def (\w+)", each, flags=re.MULTILINE)[0] for each in functions if "tl.program_id" in each}
    assert {launch.name for run in LAUNCHES.values() for launch in launched(run).values()} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_kernel_compiles_for_the_target_and_fits_it(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in {key: launch for run in LAUNCHES.values() for key, launch in launched(run).items()}.values():
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        options = {name: launch.options[name] for name in ("num_warps", "num_stages")}
        assert_fits(target, resources(target, source, **options))


DECODER = {"normalize_rows": 2, "rotate_and_put": 1, "gate_rows": 1, "attend": 1, "merge_splits": 1}
"""Compilations by kernel. There is a norm with and without a sum."""


def compilations(run: Callable[[], object]) -> dict[str, int]:
    return dict(Counter(launch.name for launch in launched(run).values()))


def test_a_decode_step_of_any_sequences_compiles_the_same() -> None:
    lengths = [1, 15, 16, 17, 33, 160, 401, 768, 5, 999]
    assert compilations(lambda: forward(LLAMA_3_8B, [decode([999])])) == DECODER
    steps = [decode([lengths[number % len(lengths)] for number in range(sequences)]) for sequences in (1, 2, 3, 9, 16, 17, 64)]
    assert compilations(lambda: forward(LLAMA_3_8B, steps)) == DECODER


def test_a_prefill_of_any_length_compiles_the_same() -> None:
    steps: list[Spans] = [[(0, 999)], [(0, 160)], [(16, 400)], [(100, 113), (7, 8)]]
    assert compilations(lambda: forward(LLAMA_3_8B, steps)) == DECODER


def test_copies_of_any_number_of_pages_compile_once_for_each_direction() -> None:
    assert compilations(copy_runs) == {"copy_runs": 2}


@pytest.mark.parametrize("sequences", range(1, 65))
def test_attention_compiles_once_for_any_count_width_and_place_of_tables(sequences: int) -> None:
    def run() -> None:
        attend(seqs=64, rows=1)
        attend(seqs=sequences, rows=1, max_blocks=24 + sequences, table_offset=sequences)
        attend(seqs=sequences, rows=4, max_blocks=64)

    assert compilations(run) == {"attend": 1, "merge_splits": 1}


def test_a_step_on_unaligned_tables_compiles_nothing_more() -> None:
    """Tables may be parts of one tensor."""

    def run() -> None:
        forward(SMOLLM2_135M, [decode([8, 400])])
        layout = PageLayout(layers=2, kv_heads=3, head_dim=64, block_tokens=16, dtype=DType.BF16)
        decoder = DeviceLlamaDecoder(empty_llama(SMOLLM2_135M._replace(layers=2), torch.bfloat16, CUDA))
        pages = Pages.of(layout, [8, 400], CUDA, vocabulary=100, content=0.0)
        asked = pages.asked(CheckedAttention(TritonAttention(PROGRAMS)), decode([8, 400]))
        asked._replace(positions=torch.zeros(3, dtype=torch.int64, device=CUDA)[1:]).logits(decoder)

    assert compilations(run) == DECODER
