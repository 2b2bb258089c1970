"""The running softmax of a query row, as both CPU kernels keep it: maximum, sum of weights and weighted sum of values so far.

Owns: how such a state takes new scores, a soft cap and a sink, how the states of one row's pieces become its result (`finish`), and
how such a result takes that over other keys (`merge_rows`).
Scores and maxima are in base 2.
Source: the online softmax of FlashAttention (Dao et al. 2022).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

import numpy as np

from attnstore.attention.functions import exp2, tanh
from attnstore.attention.simd import LANES, add, largest, load, maximum, mul, splat, store, sub, total
from attnstore.copying.compiled import compiled, inlined

NOTHING_SEEN: Final = np.float32(-1e30)
"""Running maximum of a row before its first key. Finite, so that differences of maxima are never NaN."""

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_HIDDEN: Final = np.float32(-np.inf)
_LN2: Final = np.float32(np.log(2.0))
_LOG2_E: Final = np.float32(np.log2(np.e))


@inlined
def advance(tops, sums, state, top, summed):
    """Adds weights relative to `top`, which is at least the row's running maximum, to its sum. Returns the factor for what was
    summed before.
    """
    keep = _ONE
    if top > tops[state]:
        keep = np.float32(2.0 ** (tops[state] - top))
        tops[state] = top
    sums[state] = sums[state] * keep + total(summed)
    return keep


@inlined
def weigh(scores, score, tokens, tops, sums, state):
    """Turns one row's `tokens` scores, a multiple of LANES, into weights relative to its running maximum. Returns the factor for
    what was summed before.
    """
    highest = splat(tops[state])
    for at in range(score, score + tokens, LANES):
        highest = maximum(highest, load(scores, at))
    top = largest(highest)
    highest, summed = splat(top), splat(_ZERO)
    for at in range(score, score + tokens, LANES):
        weights = exp2(sub(load(scores, at), highest))
        store(scores, at, weights)
        summed = add(summed, weights)
    return advance(tops, sums, state, top, summed)


@inlined
def cap_scores(scores, begin, end, factor, cap):
    """Turns the products `[begin, end)`, a multiple of LANES, into scores `cap * tanh(factor * product)`."""
    factors, caps = splat(factor), splat(cap)
    for at in range(begin, end, LANES):
        store(scores, at, mul(caps, tanh(mul(factors, load(scores, at)))))


@inlined
def with_sink(top, summed, sink):
    """Returns a row's maximum and sum of weights with its sink (in base e), and the factor for what was summed before."""
    sink *= _LOG2_E
    higher = max(top, sink)
    keep = np.float32(2.0 ** (top - higher))
    return higher, summed * keep + np.float32(2.0 ** (sink - higher)), keep


@compiled
def finish(pieces, owners, q_heads, head_dim, outs, tops, sums, lses, sinks):
    """Folds the states of pieces that share a row into their owner's state, adds the sinks and normalises the owners, in place.

    owners: int64 `[n]`, for each piece the state row of its sequence's first piece (its own for the first piece).
    lses: fp32 `[owner rows * q_heads]`, natural logarithm, written here; `outs` of owner rows become the attention's result.
    sinks: fp32 `[q_heads]`, or None.
    """
    for piece in range(pieces.shape[0]):
        rows, source0, target0 = pieces[piece, 2], pieces[piece, 5], owners[piece]
        if source0 == target0:
            continue
        for at in range(rows * q_heads):
            source, target = source0 * q_heads + at, target0 * q_heads + at
            top = max(tops[source], tops[target])
            add_factor, keep_factor = np.float32(2.0 ** (tops[source] - top)), np.float32(2.0 ** (tops[target] - top))
            tops[target] = top
            sums[target] = sums[target] * keep_factor + sums[source] * add_factor
            for dim in range(head_dim):
                outs[target * head_dim + dim] = (
                    outs[target * head_dim + dim] * keep_factor + outs[source * head_dim + dim] * add_factor
                )
    for at in range(lses.shape[0]):
        top, summed, keep = tops[at], sums[at], _ONE
        if sinks is not None:
            top, summed, keep = with_sink(top, summed, sinks[at % q_heads])
        if summed > _ZERO:
            lses[at] = top * _LN2 + np.log(summed)
            factor = keep / summed
            for dim in range(at * head_dim, (at + 1) * head_dim):
                outs[dim] *= factor
        else:
            lses[at] = _HIDDEN


@compiled
def merge_rows(outs, lses, rows, part_outs, part_lses):
    """Merges partials over other keys into the results of `rows`, in place, as `attnstore.attention.merge` does. Returns whether
    every element of the partials is finite; the results are useless if not.

    outs: fp32 `[total rows, q_heads, head_dim]`, lses: fp32 `[total rows, q_heads]`, natural logarithm. rows: int64 `[n]`.
    part_outs: fp32 `[n, q_heads, head_dim]`, part_lses: fp32 `[n, q_heads]`.
    """
    checked = _ZERO  # NaN as soon as an element is not finite
    for index in range(rows.shape[0]):
        row = rows[index]
        for head in range(outs.shape[1]):
            lse, part_lse = lses[row, head], part_lses[index, head]
            checked += part_lse * _ZERO
            top = max(lse, part_lse)
            keep, added = np.exp(lse - top), np.exp(part_lse - top)
            whole = keep + added
            lses[row, head] = top + np.log(whole)
            keep, added = keep / whole, added / whole
            for dim in range(outs.shape[2]):
                part = part_outs[index, head, dim]
                checked += part * _ZERO
                outs[row, head, dim] = outs[row, head, dim] * keep + part * added
    return checked == _ZERO
