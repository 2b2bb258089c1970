"""The row kernels as the decoder launches them: compiled once whatever a step looks like, and within every target's limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from triton.compiler import ASTSource

from attnstore.attention import CheckedAttention
from attnstore.attention.triton import TritonAttention
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.random_models import LLAMA_3_8B, SMOLLM2_135M, LlamaShape, empty_llama
from tests.attention.compile_target import TARGETS, resources
from tests.attention.test_triton import assert_fits
from tests.worker.fake_device import CUDA, Launch, fake_cuda
from tests.worker.model.steps import Pages, Spans

PROGRAMS = 264
ROW_KERNELS = {"normalize_rows", "rotate_and_put", "gate_rows"}


def launched(shape: LlamaShape, dtype: DType, steps: Sequence[Spans]) -> list[dict[str, Launch]]:
    """Returns, for each step, what Triton compiles for the launches of row kernels; two layers stand for all."""
    layout = PageLayout(layers=2, kv_heads=shape.kv_heads, head_dim=shape.head_dim, block_tokens=16, dtype=dtype)
    compiled = []
    with fake_cuda() as launches:
        decoder = DeviceLlamaDecoder(empty_llama(shape._replace(layers=2), TORCH_DTYPES[dtype], CUDA))
        for spans in steps:
            pages = Pages.of(layout, [end for _, end in spans], CUDA, vocabulary=shape.vocabulary, content=0.0)
            launches.clear()
            pages.asked(CheckedAttention(TritonAttention(PROGRAMS)), spans).logits(decoder)
            compiled.append({launch.compiled: launch for launch in launches if launch.name in ROW_KERNELS})
    return compiled


def decode(sequences: int) -> Spans:
    return [(40 + number, 41 + number) for number in range(sequences)]


def test_kernels_are_compiled_once_whatever_a_step_looks_like() -> None:
    steps = [decode(sequences) for sequences in (1, 2, 3, 8, 15, 16, 17, 33, 64)]
    first, *others = launched(LLAMA_3_8B, DType.BF16, [*steps, [(0, 1)], [(0, 160)], [(100, 113), (7, 8)]])
    assert {launch.name for launch in first.values()} == ROW_KERNELS
    assert len(first) == len(ROW_KERNELS) + 1  # a norm with and without a sum
    for other in others:
        assert other.keys() == first.keys()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_row_kernel_compiles_for_the_target_and_fits_it(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the decoder launches."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for shape, dtype in ((SMOLLM2_135M, DType.FP32), (LLAMA_3_8B, DType.BF16)):
        [launches] = launched(shape, dtype, [decode(3)])
        for launch in launches.values():
            source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
            report = resources(target, source, num_warps=launch.options["num_warps"])
            assert_fits(target, report)
            assert report["spilled"] == 0, report


def test_a_step_on_unaligned_tables_compiles_nothing_more() -> None:
    """Tables may be parts of one tensor."""
    shape = SMOLLM2_135M
    layout = PageLayout(layers=2, kv_heads=shape.kv_heads, head_dim=shape.head_dim, block_tokens=16, dtype=DType.BF16)
    seen = []
    with fake_cuda() as launches:
        decoder = DeviceLlamaDecoder(empty_llama(shape._replace(layers=2), torch.bfloat16, CUDA))
        pages = Pages.of(layout, [8, 4], CUDA, vocabulary=100, content=0.0)
        for begin in (0, 1):
            asked = pages.asked(CheckedAttention(TritonAttention(PROGRAMS)), [(7, 8), (3, 4)])
            places = torch.zeros(3, dtype=torch.int64, device=CUDA).narrow(0, begin, 2)
            launches.clear()
            asked._replace(positions=places).logits(decoder)
            seen.append({launch.compiled for launch in launches if launch.name in ROW_KERNELS})
    assert seen[0] == seen[1]
