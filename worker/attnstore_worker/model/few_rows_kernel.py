"""All layers of a Llama for a step of few rows, compiled: the computation of a decode step between the embedding and the logits.

Owns: `run_layers` and `run_head`, compiled by numba for the machine that they run on. Invariant: every weight is read once per
step, in the order of memory, by one thread. A step of one row is bound by reading the weights and does so little with each weight
that library calls per product, and Python between them, doubled its time (docs/decisions/0018-few-rows.md).

All threads run the same code on their share of each product's outputs and synchronise in between (`attnstore.attention.barrier`).
Cheap results that all threads need (sums, norms) are computed by each thread itself, which saves a barrier. Values between products
are fp32; inputs of a product are rounded to the weights' type. Rows are padded to a multiple of four, or one.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from attnstore.attention import cpu_kernel, online_softmax
from attnstore.attention.barrier import meet
from attnstore.attention.dots import COLUMNS, OUTPUTS, ROWS, dot_rows, dot_rows_ahead
from attnstore.attention.functions import exp2
from attnstore.attention.simd import (
    LANES,
    add,
    divide,
    dot,
    load,
    maximum,
    mul,
    prefetch,
    splat,
    store,
    store_totals,
    sub,
)
from attnstore.copying.compiled import compiled, inlined
from attnstore_worker.model.rows import add_and_normalize, turned_by
from attnstore_worker.model.weights import LayerShape

_AHEAD_BYTES: Final = 4608
"""The prefetch distance of the weights in a product of a single row; measured."""

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_LOG2_E: Final = np.float32(np.log2(np.e))
_LOWEST: Final = np.float32(-126.0)


class Work(NamedTuple):
    """Memory of a step, one-dimensional. `P` is the number of padded rows, `T` the number of threads; arrays with `T` have one part
    per thread.
    """

    hidden: Any
    """fp32 `[T, P, hidden]`: the residual stream."""
    inputs: Any
    """The weights' type, `[T, P, max(hidden, q_heads * head_dim)]`."""
    heads: Any
    """fp32 `[P, q_heads + 2 * kv_heads, head_dim]`."""
    query: Any
    """fp32 `[P, q_heads, head_dim]`: times `Batch.scale`."""
    asked: Any
    """fp32 `[P, q_heads, head_dim]`: queries as store nodes take them, if `Batch.asks`."""
    delta: Any
    """fp32 `[P, hidden]`: the term to be added to the residual stream."""
    gates: Any
    """fp32 `[P, intermediate]`."""
    ups: Any
    """fp32 `[P, intermediate]`."""
    gated: Any
    """The weights' type, `[P, intermediate]`."""
    arrived: Any
    """int64 `[1]`, see `attnstore.attention.barrier`."""


class Batch(NamedTuple):
    """One step's rows and pages, as `cpu_kernel.attend` takes them."""

    rows: Any
    cosines: Any
    """fp32 `[rows, head_dim / 2]`; `sines` likewise."""
    sines: Any
    targets: Any
    """int64 `[rows]`: the place in the pool of the first layer's first head of each row's own key."""
    flat: Any
    block_stride: Any
    block_tokens: Any
    scale: Any
    """fp32, times `log2(e)`."""
    asks: Any
    """Whether store nodes are asked about other pages."""
    tables: Any
    visible: Any
    pieces: Any
    owners: Any
    shares: Any
    """int64 `[n + 1]`: the beginning of each share of the pieces."""
    outs: Any
    """fp32 `[state rows, q_heads, head_dim]`; `tops`, `sums` `[state rows, q_heads]`; `lses` `[rows, q_heads]`."""
    tops: Any
    sums: Any
    lses: Any
    scratch: Any
    """fp32 `[T, n]`."""


@inlined
def _share(units, thread, threads):
    return units * thread // threads, units * (thread + 1) // threads


@inlined
def _one_row(weights, weight, width, inputs):
    sums = splat(_ZERO)
    for at in range(0, width, COLUMNS):
        prefetch(weights, weight + at + _AHEAD_BYTES // weights.itemsize)
        sums = dot(inputs, at, weights, weight + at, sums)
    return sums


@compiled
def product(weights, begin, width, first, last, inputs, padded, outputs, count):
    """Computes `outputs[row, n] = inputs[row] . weights[n]` for `n` in `[first, last)`, a multiple of OUTPUTS.

    weights: `[count, width]` from `begin` on; inputs: `[padded, width]`, one row or a multiple of ROWS; outputs: fp32
    `[padded, count]`. `width` is a multiple of COLUMNS.
    """
    for output in range(first, last, OUTPUTS):
        weight = begin + output * width
        if padded == 1:
            w, x = _one_row(weights, weight, width, inputs), _one_row(weights, weight + width, width, inputs)
            y, z = _one_row(weights, weight + 2 * width, width, inputs), _one_row(weights, weight + 3 * width, width, inputs)
            store_totals(outputs, output, w, x, y, z)
            continue
        dot_rows_ahead(weights, weight, inputs, 0, width, outputs, output, count)
        for row in range(ROWS, padded, ROWS):
            dot_rows(weights, weight, inputs, row * width, width, outputs, row * count + output, count)


@compiled
def _place(first, last, layer_at, shape, work, batch):
    """Places the heads `[first, last)` of each row: rotated and scaled queries in `work.query`; rotated keys, and values, in the
    pool.
    """
    half, dims = shape.head_dim // 2, shape.head_dim
    count = shape.q_heads + 2 * shape.kv_heads
    run = batch.block_tokens * dims
    scale = splat(batch.scale)
    for row in range(batch.rows):
        for head in range(first, last):
            source = (row * count + head) * dims
            if head >= shape.q_heads + shape.kv_heads:
                target = batch.targets[row] + layer_at + (head - shape.q_heads) * run
                for at in range(0, dims, LANES):
                    store(batch.flat, target + at, load(work.heads, source + at))
                continue
            for at in range(0, half, LANES):
                cosine, sine = load(batch.cosines, row * half + at), load(batch.sines, row * half + at)
                low, high = turned_by(cosine, sine, load(work.heads, source + at), load(work.heads, source + half + at))
                if head < shape.q_heads:
                    target = (row * shape.q_heads + head) * dims + at
                    if batch.asks:
                        store(work.asked, target, low)
                        store(work.asked, target + half, high)
                    store(work.query, target, mul(low, scale))
                    store(work.query, target + half, mul(high, scale))
                else:
                    target = batch.targets[row] + layer_at + (head - shape.q_heads) * run + at
                    store(batch.flat, target, low)
                    store(batch.flat, target + half, high)


@compiled
def _gate(first, last, width, rows, gates, ups, gated):
    """Computes `gated = silu(gates) * ups` in columns `[first, last)`."""
    for row in range(0, rows * width, width):
        for at in range(row + first, row + last, LANES):
            gate = load(gates, at)
            power = exp2(sub(splat(_ZERO), maximum(mul(gate, splat(_LOG2_E)), splat(_LOWEST))))
            store(gated, at, mul(divide(gate, add(splat(_ONE), power)), load(ups, at)))


@inlined
def _mine(rows, thread, threads, shape, work):
    """Returns the thread's copies of the residual stream, of these rows, and of a product's inputs."""
    padded = work.delta.shape[0] // shape.hidden
    room = work.inputs.shape[0] // threads
    first = thread * padded * shape.hidden
    return work.hidden[first : first + rows * shape.hidden], work.inputs[thread * room : (thread + 1) * room]


@inlined
def _layer_elements(shape):
    return shape.hidden * (2 + (2 * shape.q_heads + 2 * shape.kv_heads) * shape.head_dim + 3 * shape.intermediate)


@compiled
def _begin(layer, thread, threads, shape, weights, epsilon, work, batch):
    """A layer up to its attention: ends with the queries and the row's own keys and values in their places."""
    hidden, heads = shape.hidden, shape.q_heads + 2 * shape.kv_heads
    mine, inputs = _mine(batch.rows, thread, threads, shape, work)
    head0, head1 = _share(heads, thread, threads)
    at = layer * _layer_elements(shape)
    layer_at = layer * 2 * shape.kv_heads * batch.block_tokens * shape.head_dim
    add_and_normalize(mine, work.delta, weights[at : at + hidden], epsilon, inputs)
    padded, width = work.delta.shape[0] // hidden, heads * shape.head_dim
    product(weights, at + hidden, hidden, head0 * shape.head_dim, head1 * shape.head_dim, inputs, padded, work.heads, width)
    _place(head0, head1, layer_at, shape, work, batch)
    meet(work.arrived, threads)


@compiled
def run_attention(layer, thread, threads, shape: LayerShape, work, batch):
    """Runs the attention of `layer` over the pages of the pool: ends with it in `batch.outs` and `batch.lses`. Called like
    `run_layers`.
    """
    layer_at = layer * 2 * shape.kv_heads * batch.block_tokens * shape.head_dim
    scratch = batch.scratch.shape[0] // threads
    for share in range(thread, batch.shares.shape[0] - 1, threads):
        cpu_kernel.attend(
            batch.pieces[batch.shares[share] : batch.shares[share + 1]],
            batch.tables,
            batch.visible,
            work.query,
            batch.flat,
            batch.block_stride,
            layer_at,
            shape.kv_heads,
            shape.q_heads // shape.kv_heads,
            batch.block_tokens,
            shape.head_dim,
            batch.outs,
            batch.tops,
            batch.sums,
            batch.scratch[thread * scratch : (thread + 1) * scratch],
            None,
        )
    meet(work.arrived, threads)
    if thread == 0:
        online_softmax.finish(
            batch.pieces, batch.owners, shape.q_heads, shape.head_dim, batch.outs, batch.tops, batch.sums, batch.lses, None
        )
    meet(work.arrived, threads)


@compiled
def _end(layer, thread, threads, shape, weights, epsilon, work, batch):
    """A layer after its attention."""
    hidden, attended = shape.hidden, shape.q_heads * shape.head_dim
    padded = work.delta.shape[0] // hidden
    mine, inputs = _mine(batch.rows, thread, threads, shape, work)
    hidden0, hidden1 = _share(hidden // LANES, thread, threads)
    middle0, middle1 = _share(shape.intermediate // LANES, thread, threads)
    hidden0, hidden1, middle0, middle1 = hidden0 * LANES, hidden1 * LANES, middle0 * LANES, middle1 * LANES
    at = layer * _layer_elements(shape) + hidden + hidden * (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    for value in range(0, batch.rows * attended, LANES):
        store(inputs, value, load(batch.outs, value))
    product(weights, at, attended, hidden0, hidden1, inputs, padded, work.delta, hidden)
    at += attended * hidden
    meet(work.arrived, threads)
    add_and_normalize(mine, work.delta, weights[at : at + hidden], epsilon, inputs)
    at += hidden
    product(weights, at, hidden, middle0, middle1, inputs, padded, work.gates, shape.intermediate)
    at += shape.intermediate * hidden
    product(weights, at, hidden, middle0, middle1, inputs, padded, work.ups, shape.intermediate)
    at += shape.intermediate * hidden
    _gate(middle0, middle1, shape.intermediate, batch.rows, work.gates, work.ups, work.gated)
    meet(work.arrived, threads)
    product(weights, at, shape.intermediate, hidden0, hidden1, work.gated, padded, work.delta, hidden)
    meet(work.arrived, threads)


@compiled
def run_layers(first, last, thread, threads, shape: LayerShape, weights, epsilon, work, batch):
    """Runs layers `[first, last)` on `work.hidden` and `work.delta`, whose sum is the input and the result.

    Called by `threads` threads at once, each with its number. weights: see `LayerWeights`.
    """
    for layer in range(first, last):
        _begin(layer, thread, threads, shape, weights, epsilon, work, batch)
        run_attention(layer, thread, threads, shape, work, batch)
        _end(layer, thread, threads, shape, weights, epsilon, work, batch)


@compiled
def run_to_attention(layer, layers, thread, threads, shape: LayerShape, weights, epsilon, work, batch):
    """Runs from the attention of the layer before `layer`, if there is one, to that of `layer`, or to the end after the last of
    `layers`. Called like `run_layers`.
    """
    if layer > 0:
        _end(layer - 1, thread, threads, shape, weights, epsilon, work, batch)
    if layer < layers:
        _begin(layer, thread, threads, shape, weights, epsilon, work, batch)


@compiled
def run_head(thread, threads, norm, head, epsilon, rows, work, inputs, logits):
    """Computes the logits of the rows, int64 `[n]`, after the last layer, fp32 `[padded n, vocabulary]`. norm: `[hidden]`; head:
    `[vocabulary, hidden]`.

    inputs: the weights' type, `[T, padded n, hidden]`. Called like `run_layers`.
    """
    hidden = norm.shape[0]
    room = inputs.shape[0] // threads
    mine = inputs[thread * room : (thread + 1) * room]
    before = work.hidden[thread * work.delta.shape[0] : (thread + 1) * work.delta.shape[0]]
    for row in range(rows.shape[0]):
        source = slice(rows[row] * hidden, (rows[row] + 1) * hidden)
        add_and_normalize(before[source], work.delta[source], norm, epsilon, mine[row * hidden : (row + 1) * hidden])
    padded = room // hidden
    vocabulary = head.shape[0] // hidden
    first, last = _share(vocabulary // OUTPUTS, thread, threads)
    product(head, 0, hidden, first * OUTPUTS, last * OUTPUTS, mine, padded, logits, vocabulary)
