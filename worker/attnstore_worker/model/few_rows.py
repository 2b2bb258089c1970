"""A step of few rows through a Llama: decoding, and verification of drafts.

Owns: `FewRows`: which steps it takes, the memory of a step and the threads. Invariant: its logits equal those of the general path
up to rounding, and the step's own keys and values are in the pool afterwards. `few_rows_kernel` describes the computation and the
reason for it.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from attnstore.attention import CheckedAttention, cpu_kernel, cpu_pages, team
from attnstore.attention.cpu_plan import Plan
from attnstore.attention.dots import COLUMNS, OUTPUTS, ROWS
from attnstore.attention.simd import ELEMENTS
from attnstore_worker.cache.attending.step import RemoteStep
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.few_rows_kernel import Batch, Work, run_attention, run_head, run_layers, run_to_attention
from attnstore_worker.model.weights import LayerShape, LayerWeights

ROWS_MAX: Final = 96
"""Up to this many rows, this path costs less than library calls for each product; measured, docs/decisions/0018-few-rows.md."""

_SHARE_BYTES_MIN: Final = 64 * 1024
"""Bytes of keys and values per thread: all threads run anyway, so a share only has to be worth its merge."""


def fits(shape: LayerShape, vocabulary: int) -> bool:
    """Returns whether the kernel supports weights of these sizes."""
    widths = (shape.hidden, shape.intermediate, shape.head_dim)
    return all(width % COLUMNS == 0 for width in widths) and vocabulary % OUTPUTS == 0


class FewRows:
    """All layers of a model in one compiled call, or in two for each layer of a step that waits for pages or for store nodes. Steps
    of several threads have memory of their own, because such a step may wait long.

    weights, the last `norm`, `[hidden]`, and `head`, `[vocabulary, hidden]`, are read in place, by as many threads as torch uses.
    """

    def __init__(self, weights: LayerWeights, norm: Tensor, head: Tensor, *, epsilon: float, scale: float) -> None:
        self._shape, self._dtype, self._layers = weights.shape, weights.flat.dtype, len(weights.flat)
        self._weights, self._norm, self._head = _flat(weights.flat), _flat(norm), _flat(head)
        self._epsilon, self._scale = np.float32(epsilon), np.float32(scale * math.log2(math.e))
        self._kept: tuple[tuple[int, int], Work] | None = None
        self._lock = threading.Lock()

    def plan(self, total_q: int, step: PagedStep) -> Plan | None:
        """Returns how the attention of a step of `total_q` rows is divided, or None for a step that needs the general path."""
        if total_q > ROWS_MAX or not isinstance(step.backend, CheckedAttention):
            return None
        if step.remote is not None and not step.remote.takes_arrays:
            return None
        query = torch.empty(total_q, self._shape.q_heads, self._shape.head_dim, dtype=self._dtype)
        tables = (step.block_tables, step.context_lens, step.query_starts)
        plan = step.backend.plan(query, step.pool, *tables, share_bytes_min=_SHARE_BYTES_MIN)
        return None if plan is None or plan.prefills else plan

    def logits(self, embedded: Tensor, rotation: tuple[Tensor, Tensor], rows: Tensor, step: PagedStep, plan: Plan) -> Tensor:
        """See `Decoder.logits`. embedded: `[total_q, hidden]`; rotation: fp32 cosines and sines, `[total_q, head_dim / 2]`."""
        threads = torch.get_num_threads()
        work = self._take_memory(len(embedded), threads)
        torch.from_numpy(work.hidden).view(threads, -1, self._shape.hidden)[:, : len(embedded)] = embedded
        work.delta.fill(0)
        batch = self._batch(rotation, step, plan, threads)
        if step.remote is not None:
            self._run_asking(step.remote, step, work, batch, threads)
        else:
            self._run(step, work, batch, threads)
        logits = self._logits(rows, work, threads)
        self._give_back(work, len(embedded), threads)  # not after an error: the counter may be spoilt
        return logits

    def _run(self, step: PagedStep, work: Work, batch: Batch, threads: int) -> None:
        ranges = [(0, self._layers)] if step.before_layer is at_once else [(layer, layer + 1) for layer in range(self._layers)]
        for first, last in ranges:
            step.before_layer(first)

            def part(thread: int, first: int = first, last: int = last) -> None:
                run_layers(first, last, thread, threads, self._shape, self._weights, self._epsilon, work, batch)

            team.run(threads, part, work.arrived)

    def _run_asking(self, remote: RemoteStep, step: PagedStep, work: Work, batch: Batch, threads: int) -> None:
        """Runs all layers; the nodes compute while this thread attends to the pages that are here."""
        shape = self._shape
        asked = work.asked.reshape(-1, shape.q_heads, shape.head_dim)[: batch.rows]
        outs = batch.outs.reshape(-1, shape.q_heads, shape.head_dim)[: batch.rows]
        lses = batch.lses.reshape(-1, shape.q_heads)

        def to_attention(layer: int) -> None:
            weights = self._weights, self._epsilon
            team.run(
                threads,
                lambda thread: run_to_attention(layer, self._layers, thread, threads, shape, *weights, work, batch),
                work.arrived,
            )

        def attention(layer: int) -> None:
            team.run(threads, lambda thread: run_attention(layer, thread, threads, shape, work, batch), work.arrived)

        for layer in range(self._layers):
            step.before_layer(layer)
            to_attention(layer)
            remote.ask_rows(layer, asked)
            attention(layer)
            remote.merge_rows(outs, lses)
        to_attention(self._layers)

    def _logits(self, rows: Tensor, work: Work, threads: int) -> Tensor:
        padded, hidden = _padded(len(rows)), self._shape.hidden
        inputs = _flat(torch.zeros(threads * padded * hidden, dtype=self._dtype))
        logits = torch.empty(padded, len(self._head) // hidden)
        if not padded:
            return logits
        places, flat_logits = rows.numpy(), logits.view(-1).numpy()

        def part(thread: int) -> None:
            run_head(thread, threads, self._norm, self._head, self._epsilon, places, work, inputs, flat_logits)

        team.run(threads, part)
        return logits[: len(rows)]

    def _take_memory(self, rows: int, threads: int) -> Work:
        """Returns memory that no other step uses: what the last step gave back, if it has the right size."""
        padded = _padded(rows)
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept[0] == (padded, threads):
            return kept[1]
        shape = self._shape
        attended = shape.q_heads * shape.head_dim

        def floats(elements: int) -> Any:
            return torch.zeros(elements).numpy()

        def typed(elements: int) -> Any:
            return _flat(torch.zeros(elements, dtype=self._dtype))

        return Work(
            hidden=floats(threads * padded * shape.hidden),
            inputs=typed(threads * padded * max(shape.hidden, attended)),
            heads=floats(padded * (attended + 2 * shape.kv_heads * shape.head_dim)),
            query=floats(padded * attended),
            asked=floats(padded * attended),
            delta=floats(padded * shape.hidden),
            gates=floats(padded * shape.intermediate),
            ups=floats(padded * shape.intermediate),
            gated=typed(padded * shape.intermediate),
            arrived=np.zeros(1, np.int64),
        )

    def _give_back(self, work: Work, rows: int, threads: int) -> None:
        with self._lock:
            self._kept = (_padded(rows), threads), work

    def _batch(self, rotation: tuple[Tensor, Tensor], step: PagedStep, plan: Plan, threads: int) -> Batch:
        shape, pool = self._shape, step.pool
        states = plan.state_rows * shape.q_heads
        scratch = cpu_kernel.scratch_elements(plan.piece_rows_max, shape.q_heads, pool.shape[4], shape.head_dim)
        return Batch(
            rows=len(plan.decode_rows),
            cosines=rotation[0].view(-1).numpy(),
            sines=rotation[1].view(-1).numpy(),
            targets=(step.slot_blocks * pool.stride(0) + step.slot_offsets * shape.head_dim).numpy(),
            flat=cpu_pages.elements(pool),
            block_stride=pool.stride(0),
            block_tokens=pool.shape[4],
            scale=self._scale,
            asks=step.remote is not None,
            tables=step.block_tables.numpy(),
            visible=plan.visible,
            pieces=plan.pieces,
            owners=plan.owners,
            shares=np.cumsum([0, *(len(share) for share in plan.shares)]),
            outs=torch.empty(states * shape.head_dim).numpy(),
            tops=torch.empty(states).numpy(),
            sums=torch.empty(states).numpy(),
            lses=torch.empty(len(plan.decode_rows) * shape.q_heads).numpy(),
            scratch=torch.empty(threads * -(-scratch // 16) * 16).numpy(),
        )


def _padded(rows: int) -> int:
    return rows if rows < 2 else -(-rows // ROWS) * ROWS


def _flat(rows: Tensor) -> Any:
    return rows.detach().view(ELEMENTS[rows.dtype]).view(-1).numpy()
