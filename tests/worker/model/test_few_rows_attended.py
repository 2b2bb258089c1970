"""Steps of few rows that ask store nodes: the logits equal those of a step that has all pages, and faults end the step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from attnstore import errors
from attnstore.attention.reference import ReferenceAttention
from attnstore.client.base import AttendStream
from attnstore_worker.cache.attending.step import AttendCounts, RemoteStep, SetRows
from attnstore_worker.errors import PagesLost
from attnstore_worker.model import LoadedModel
from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.llama import LlamaDecoder
from tests.worker.model.test_few_rows import BLOCK_TOKENS, TOLERANCE, Asked, asked, compute_threads, takes
from tests.worker.model.test_few_rows import typed as typed

ROWS_MAX = 1024
REMOTE_BLOCKS = 3


class Node:
    """An `AttendStream` whose sets are pages of `pool`, named by their block ids."""

    def __init__(self, pool: Tensor, sets: Sequence[Tensor], scale: float) -> None:
        self._pool, self._sets, self._scale = pool, sets, scale
        self._answers: list[tuple[Tensor, Tensor]] = []
        self.fails_at: int | None = None
        self.spoils: float | None = None
        self.written: list[memoryview] = []
        self.queries = 0
        self.takes_s = 0.0

    def ask(self, layer: int, sets: Sequence[tuple[int, int]], rows: memoryview, firsts: Sequence[int] = ()) -> None:
        assert not firsts
        self.queries += 1
        query = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(
            sum(count for _, count in sets), -1, self._pool.shape[5]
        )
        parts = []
        for (set_id, count), part in zip(sets, query.split([count for _, count in sets]), strict=True):
            table = self._sets[set_id].view(1, -1)
            parts.append(
                ReferenceAttention().paged_attention(
                    part,
                    self._pool,
                    table,
                    torch.tensor([table.numel() * BLOCK_TOKENS], dtype=torch.int32),
                    torch.tensor([0, count], dtype=torch.int32),
                    layer=layer,
                    scale=self._scale,
                    query_positions=torch.full((count,), 1 << 20, dtype=torch.int32),
                    out_dtype=torch.float32,
                )
            )
        outs, lses = zip(*parts, strict=True)
        self._answers.append((torch.cat(outs), torch.cat(lses)))

    def receive(self, out: memoryview, lse: memoryview) -> None:
        if self.queries == self.fails_at:
            raise errors.Unavailable("the node is gone")
        time.sleep(self.takes_s)
        partial = self._answers.pop(0)
        if self.spoils is not None:
            partial[self.queries % 2].view(-1)[-1] = self.spoils
        self.written += [out, lse]
        for view, tensor in zip((out, lse), partial, strict=True):
            array: Any = tensor.contiguous().numpy()
            view[:] = memoryview(array).cast("B")


@dataclass
class Split:
    """A step whose sequences have their first blocks at nodes; `whole` is the step with all of them here."""

    whole: Asked
    step: Asked
    nodes: list[Node]
    lost: list[AttendStream]

    def renewed(self) -> Split:
        """Returns the same step, asked anew."""
        return split(self.whole, self.remote_blocks, len(self.nodes), self.scale, self.rows_max)

    remote_blocks: list[int]
    scale: float
    rows_max: int


def split(whole: Asked, remote_blocks: list[int], nodes: int, scale: float, rows_max: int = ROWS_MAX) -> Split:
    """Leaves the first `remote_blocks[i]` blocks of sequence `i` to the nodes, one after the other in turn."""
    step = whole.step
    counts = step.query_starts.diff().tolist()
    made = []
    for number in range(nodes):
        tables = [row[number:blocks:nodes] for row, blocks in zip(step.block_tables, remote_blocks, strict=True)]
        made.append(Node(step.pool.clone(), tables, scale))
    asked_sets: dict[AttendStream, list[SetRows]] = {}
    for node in made:
        first, sets = 0, []
        for set_id, count in enumerate(counts):
            if pages := len(node._sets[set_id]):
                sets.append(SetRows(set_id, first, count, range(pages), 0))
            first += count
        asked_sets[cast(AttendStream, node)] = sets
    lost: list[AttendStream] = []
    remote = RemoteStep(asked_sets, rows_max, BLOCK_TOKENS, AttendCounts(), lambda stream, _: lost.append(stream))
    width = max(row.shape[0] - blocks for row, blocks in zip(step.block_tables, remote_blocks, strict=True))
    here = torch.zeros(len(remote_blocks), max(1, width), dtype=torch.int32)
    for row, table, blocks in zip(here, step.block_tables, remote_blocks, strict=True):
        row[: len(table) - blocks] = table[blocks:]
    lengths = step.context_lens - torch.tensor(remote_blocks, dtype=torch.int32) * BLOCK_TOKENS
    changed = replace(step, block_tables=here, context_lens=lengths, remote=remote)
    return Split(whole, replace(whole, step=changed), made, lost, remote_blocks, scale, rows_max)


def scale_of(model: LoadedModel) -> float:
    return float(model.module.model.layers[0].self_attn.scaling)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows_max", [ROWS_MAX, 2], ids=["one query", "pieces"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    ("context_lens", "query_lens", "remote_blocks"),
    [
        ([100], [1], [4]),
        ([130, 70, 100], [1, 4, 2], [8, 0, 2]),
        ([65], [1], [4]),
    ],
    ids=["one row", "several", "only its own key is here"],
)
def test_logits_equal_those_of_a_step_that_has_all_pages(
    typed: LoadedModel,
    threads: int,
    rows_max: int,
    nodes: int,
    context_lens: list[int],
    query_lens: list[int],
    remote_blocks: list[int],
) -> None:
    decoder = typed.decoder
    assert isinstance(decoder, LlamaDecoder)
    part = split(asked(typed, context_lens, query_lens), remote_blocks, nodes, scale_of(typed), rows_max)
    assert takes(decoder, part.step)
    with compute_threads(threads):
        expected, _ = part.whole.logits(decoder)
        got, _ = part.step.logits(decoder)
    assert all(node.queries for node in part.nodes)
    assert float((got - expected).abs().max()) < TOLERANCE[typed.layout(16).dtype]
    assert part.lost == []


def test_pages_that_are_still_arriving_are_waited_for_before_each_layer(tiny: LoadedModel) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    layers: list[int] = []
    part = split(asked(tiny, [100], [2], before_layer=layers.append), [3], 1, scale_of(tiny))
    expected, _ = replace(part.whole, step=replace(part.whole.step, before_layer=lambda _: None)).logits(tiny.decoder)
    got, _ = part.step.logits(tiny.decoder)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert layers == list(range(tiny.layout(16).layers))


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_partial_that_is_not_finite_ends_the_step(tiny: LoadedModel, spoil: float, nodes: int) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    part = split(asked(tiny, [100], [1]), [4], nodes, scale_of(tiny))
    part.nodes[-1].spoils = spoil
    with pytest.raises(PagesLost, match="not finite"):
        part.step.logits(tiny.decoder)
    assert len(part.lost) == nodes
    assert_the_next_step_is_right(part, tiny.decoder)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_node_that_is_lost_amid_a_step_ends_it(tiny: LoadedModel, layer: int) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    part = split(asked(tiny, [100, 90], [1, 2]), [4, 2], 2, scale_of(tiny))
    part.nodes[0].fails_at = layer
    with pytest.raises(PagesLost, match="the node is gone"):
        part.step.logits(tiny.decoder)
    assert len(part.lost) == 2, "the other node's answer is in flight"
    assert_the_next_step_is_right(part, tiny.decoder)


def test_a_node_twice_as_slow_as_its_twin_costs_time_and_no_digit(tiny: LoadedModel) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    part = split(asked(tiny, [100], [1]), [4], 2, scale_of(tiny))
    for number, node in enumerate(part.nodes, 1):
        node.takes_s = number * 0.01
    expected, _ = part.whole.logits(tiny.decoder)
    got, _ = part.step.logits(tiny.decoder)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_an_answer_that_comes_late_reaches_no_later_step(tiny: LoadedModel) -> None:
    """A step that was given up left memory that a late answer may still be written to: the next step uses other memory."""
    assert isinstance(tiny.decoder, LlamaDecoder)
    given_up = split(asked(tiny, [100], [1]), [4], 1, scale_of(tiny))
    given_up.nodes[0].fails_at = 2
    with pytest.raises(PagesLost):
        given_up.step.logits(tiny.decoder)
    late = given_up.nodes[0].written
    assert late

    class Poisoning(Node):
        def receive(self, out: memoryview, lse: memoryview) -> None:
            super().receive(out, lse)
            for view in late:
                view[:] = b"\xff" * len(view)

    again = given_up.renewed()
    for node in again.nodes:
        node.__class__ = Poisoning
    expected, _ = again.whole.logits(tiny.decoder)
    got, _ = again.step.logits(tiny.decoder)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def assert_the_next_step_is_right(part: Split, decoder: LlamaDecoder) -> None:
    again = part.renewed()
    expected, _ = again.whole.logits(decoder)
    got, _ = again.step.logits(decoder)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_step_whose_queries_are_on_a_device_goes_the_other_way(tiny: LoadedModel) -> None:
    assert isinstance(tiny.decoder, LlamaDecoder)
    part = split(asked(tiny, [100], [1]), [4], 1, scale_of(tiny))
    on_device: PagedStep = replace(part.step.step, remote=cast(RemoteStep, _OnDevice()))
    assert not takes(tiny.decoder, replace(part.step, step=on_device))


class _OnDevice:
    takes_arrays = False
