"""Steps of few rows in one compiled call: the logits and pages equal those of the general path."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnstore.attention import create_attention
from attnstore.core.layout import DType
from attnstore_worker.errors import PagesLost
from attnstore_worker.model import LoadedModel, few_rows, load_model
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.few_rows import ROWS_MAX, fits
from attnstore_worker.model.llama import LlamaDecoder
from attnstore_worker.model.weights import layer_shape

BLOCK_TOKENS = 16
TOLERANCE = {DType.FP32: 1e-4, DType.FP16: 0.05, DType.BF16: 0.4}
"""For logits of about 8: the general path rounds after every product, this one only the inputs of the next."""


@dataclass(frozen=True)
class Asked:
    """One step of sequences of random tokens, over a pool of random pages."""

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    step: PagedStep

    def logits(self, decoder: LlamaDecoder) -> tuple[Tensor, Tensor]:
        """Returns the logits and the pool afterwards; the pool of `step` is unchanged."""
        step = replace(self.step, pool=self.step.pool.clone())
        return decoder.logits(self.token_ids, self.positions, self.rows, step), step.pool


def asked(model: LoadedModel, context_lens: list[int], query_lens: list[int], *, seed: int = 1, **changes: Any) -> Asked:
    torch.manual_seed(seed)
    layout = model.layout(BLOCK_TOKENS)
    dtype = model.module.dtype
    blocks = [-(-length // BLOCK_TOKENS) for length in context_lens]
    ids = torch.randperm(sum(blocks) + 3, dtype=torch.int32)
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, count, part in zip(tables, blocks, ids[: sum(blocks)].split(blocks), strict=True):
        row[:count] = part
    spans = list(zip(context_lens, query_lens, strict=True))
    positions = [position for length, rows in spans for position in range(length - rows, length)]
    owners = [sequence for sequence, (_, rows) in enumerate(spans) for _ in range(rows)]
    places = [(int(tables[owner, at // BLOCK_TOKENS]), at % BLOCK_TOKENS) for owner, at in zip(owners, positions, strict=True)]
    step = PagedStep(
        backend=create_attention("cpu"),
        pool=torch.randn(len(ids), *layout.shape).to(dtype),
        slot_blocks=torch.tensor([block for block, _ in places]),
        slot_offsets=torch.tensor([offset for _, offset in places]),
        block_tables=tables,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        query_starts=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        before_layer=at_once,
    )
    tokens = torch.tensor([random.Random(seed + at).randrange(3, 49_000) for at in range(len(positions))])
    return Asked(tokens, torch.tensor(positions), torch.arange(len(positions)), replace(step, **changes))


@contextmanager
def compute_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(TOLERANCE), ids=lambda dtype: dtype.value)
def typed(request: pytest.FixtureRequest, tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder, request.param)


def other_way(decoder: LlamaDecoder, question: Asked) -> tuple[Tensor, Tensor]:
    kept, decoder._few_rows = decoder._few_rows, None
    try:
        return question.logits(decoder)
    finally:
        decoder._few_rows = kept


def takes(decoder: LlamaDecoder, question: Asked) -> bool:
    assert decoder._few_rows is not None
    return decoder._few_rows.plan(len(question.token_ids), question.step) is not None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("context_lens", "query_lens"),
    [
        ([1], [1]),
        ([100], [1]),
        ([100], [3]),
        ([40, 7, 130], [1, 4, 2]),
        ([200] * 8, [1] * 8),
        ([16, 33, 90, 18], [4, 4, 4, 4]),
        ([30] * 41, [1] * 41),
    ],
)
def test_logits_and_pages_are_those_of_the_other_way(
    typed: LoadedModel, context_lens: list[int], query_lens: list[int], threads: int
) -> None:
    assert isinstance(typed.decoder, LlamaDecoder)
    question = asked(typed, context_lens, query_lens)
    assert takes(typed.decoder, question)
    with compute_threads(threads):
        got, pool = question.logits(typed.decoder)
    want, expected_pool = other_way(typed.decoder, question)
    tolerance = TOLERANCE[typed.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0.02)
    torch.testing.assert_close(pool, expected_pool, atol=tolerance, rtol=0.02)
    untouched = torch.ones(pool.shape[0], BLOCK_TOKENS, dtype=torch.bool)
    untouched[question.step.slot_blocks, question.step.slot_offsets] = False
    tokens_first = pool.movedim(4, 1)
    assert torch.equal(tokens_first[untouched], question.step.pool.movedim(4, 1)[untouched])


def test_only_the_rows_that_are_asked_for_have_logits(tiny: LoadedModel) -> None:
    question = asked(tiny, [50, 20], [5, 3])
    assert isinstance(tiny.decoder, LlamaDecoder)
    every, _ = question.logits(tiny.decoder)
    for rows in ([4, 7], [2], []):
        some, _ = replace(question, rows=torch.tensor(rows, dtype=torch.int64)).logits(tiny.decoder)
        torch.testing.assert_close(some, every[rows], atol=1e-5, rtol=1e-5)


def test_a_step_repeated_after_others_gives_the_same(tiny: LoadedModel) -> None:
    """Memory kept between steps does not affect the results."""
    question = asked(tiny, [50, 20], [2, 1])
    assert isinstance(tiny.decoder, LlamaDecoder)
    first, _ = question.logits(tiny.decoder)
    for lengths in ([300, 2, 2, 2], [9], [64, 64]):
        asked(tiny, lengths, [2] * len(lengths), seed=len(lengths)).logits(tiny.decoder)
    again, _ = question.logits(tiny.decoder)
    assert torch.equal(first, again)


def test_each_layers_pages_are_waited_for_before_the_layer_runs(tiny: LoadedModel) -> None:
    """A layer's pages arrive only with its turn here, so none of them was read before."""
    question = asked(tiny, [70], [2])
    assert isinstance(tiny.decoder, LlamaDecoder)
    expected, _ = question.logits(tiny.decoder)
    late = question.step.pool.clone()
    late.fill_(torch.nan)
    waited: list[int] = []

    def before_layer(layer: int) -> None:
        waited.append(layer)
        late[:, layer] = question.step.pool[:, layer]

    step = replace(question.step, pool=late, before_layer=before_layer)
    got = tiny.decoder.logits(question.token_ids, question.positions, question.rows, step)
    assert waited == list(range(tiny.module.config.num_hidden_layers))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_pages_that_are_lost_end_the_step(tiny: LoadedModel) -> None:
    def before_layer(layer: int) -> None:
        if layer == 1:
            raise PagesLost("gone")

    question = asked(tiny, [70], [2])
    assert isinstance(tiny.decoder, LlamaDecoder)
    expected, _ = question.logits(tiny.decoder)
    with pytest.raises(PagesLost):
        replace(question, step=replace(question.step, before_layer=before_layer)).logits(tiny.decoder)
    again, _ = question.logits(tiny.decoder)
    assert torch.equal(again, expected)


def test_a_step_that_was_interrupted_leaves_nothing_behind(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    question = asked(tiny, [70], [2])
    assert isinstance(tiny.decoder, LlamaDecoder)
    run_layers = few_rows.run_layers

    def interrupted(first: int, last: int, thread: int, *others: Any) -> None:
        if thread == 1:
            raise KeyboardInterrupt
        run_layers(first, last, thread, *others)

    with compute_threads(2):
        expected, _ = question.logits(tiny.decoder)
        monkeypatch.setattr(few_rows, "run_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            question.logits(tiny.decoder)
        monkeypatch.undo()
        again, _ = question.logits(tiny.decoder)
    assert torch.equal(again, expected)


def test_other_steps_go_the_other_way(tiny: LoadedModel) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    most = asked(tiny, [ROWS_MAX] * 2, [ROWS_MAX // 2] * 2)
    assert takes(tiny.decoder, most)
    assert not takes(tiny.decoder, asked(tiny, [40, 40], [ROWS_MAX // 2, ROWS_MAX // 2 + 1]))
    assert not takes(tiny.decoder, replace(most, step=replace(most.step, backend=create_attention("reference"))))


def test_models_with_biases_or_of_odd_sizes_go_the_other_way(tiny_folder: Path, tiny: LoadedModel) -> None:
    shape = layer_shape(tiny.module)
    assert fits(shape, 49_152)
    assert not fits(shape._replace(intermediate=144), 49_152)
    assert not fits(shape._replace(head_dim=80), 49_152)
    assert not fits(shape, 49_153)
    config = transformers.AutoConfig.from_pretrained(str(tiny_folder))
    config.update({"attention_bias": True})
    module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    assert LlamaDecoder(module)._few_rows is None


def test_the_modules_weights_are_views_of_those_that_are_read(tiny: LoadedModel) -> None:
    """The weights exist once: a change through the module changes the kernel's weights."""
    question = asked(tiny, [30], [1])
    decoder = tiny.decoder
    assert isinstance(decoder, LlamaDecoder)
    before, _ = question.logits(decoder)
    weight = tiny.module.model.layers[0].mlp.down_proj.weight
    kept = weight.clone()
    try:
        weight.zero_()
        changed, _ = question.logits(decoder)
        assert not torch.equal(changed, before)
    finally:
        weight.copy_(kept)
    assert torch.equal(question.logits(decoder)[0], before)
