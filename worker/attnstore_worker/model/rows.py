"""The operations of a decoder layer on its rows between two matrix products, in one pass each.

Owns: `normalized`, `added_and_normalized` and `rotate`, and their parts that other kernels call, compiled by numba for the machine
that they run on. Invariant: results equal those of torch's operations up to rounding, and each value is rounded once where torch
rounds after each operation. torch's norm alone takes several operations; its calls took 2.5 ms of a decode step of 25 ms
(docs/decisions/0017-lean-decoder.md).

Rows are consecutive in memory. Elements are bf16, fp16 or fp32, sixteen at a time (`attnstore.attention.simd`).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from attnstore.attention.simd import ELEMENTS, LANES, add, fma, load, mul, splat, store, sub, total
from attnstore.copying.compiled import compiled, inlined

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)


def fits(hidden_size: int, head_dim: int) -> bool:
    """Returns whether rows of these sizes can be processed sixteen elements at a time."""
    return hidden_size % LANES == 0 and head_dim % (2 * LANES) == 0


def normalized(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`hidden / sqrt(mean(hidden ** 2) + epsilon) * weight` by row (RMSNorm, Zhang and Sennrich 2019): `[rows, hidden_size]`."""
    result = torch.empty_like(hidden)
    _normalize(_flat(hidden), _flat(weight), np.float32(epsilon), _flat(result))
    return result


def added_and_normalized(hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Adds `hidden += delta` in place, then returns `normalized`."""
    result = torch.empty_like(hidden)
    add_and_normalize(_flat(hidden), _flat(delta), _flat(weight), np.float32(epsilon), _flat(result))
    return result


def rotate(heads: Tensor, turned: int, cosines: Tensor, sines: Tensor) -> None:
    """Rotates the first `turned` heads of `heads`, `[rows, heads, head_dim]`, in place: RoPE in the order of GPT-NeoX.

    cosines, sines: fp32 `[rows, head_dim / 2]`, of the angle between element `i` and element `i + head_dim / 2`.
    """
    _, count, head_dim = heads.shape
    _rotate(_flat(heads), count, turned, head_dim, _flat(cosines), _flat(sines))


def _flat(rows: Tensor) -> Any:
    return rows.view(ELEMENTS[rows.dtype]).view(-1).numpy()


@compiled
def _normalize(hidden, weight, epsilon, result):
    width = weight.shape[0]
    for row in range(0, hidden.shape[0], width):
        squares = splat(_ZERO)
        for dim in range(0, width, LANES):
            value = load(hidden, row + dim)
            squares = fma(value, value, squares)
        _scale(hidden, row, weight, width, squares, epsilon, result)


@compiled
def add_and_normalize(hidden, delta, weight, epsilon, result):
    """`added_and_normalized` on flat arrays, for other compiled code: for all rows of `hidden`."""
    width = weight.shape[0]
    for row in range(0, hidden.shape[0], width):
        squares = splat(_ZERO)
        for dim in range(0, width, LANES):
            store(hidden, row + dim, add(load(hidden, row + dim), load(delta, row + dim)))
            value = load(hidden, row + dim)
            squares = fma(value, value, squares)
        _scale(hidden, row, weight, width, squares, epsilon, result)


@inlined
def _scale(hidden, row, weight, width, squares, epsilon, result):
    factor = splat(_ONE / np.sqrt(total(squares) / np.float32(width) + epsilon))
    for dim in range(0, width, LANES):
        store(result, row + dim, mul(mul(load(hidden, row + dim), factor), load(weight, dim)))


@inlined
def turned_by(cosine, sine, first, second):
    """Returns the two halves of a head after their rotation."""
    return sub(mul(first, cosine), mul(second, sine)), fma(second, cosine, mul(first, sine))


@compiled
def _rotate(heads, count, turned, head_dim, cosines, sines):
    half = head_dim // 2
    for row in range(heads.shape[0] // (count * head_dim)):
        for head in range(turned):
            low = (row * count + head) * head_dim
            for dim in range(0, half, LANES):
                cosine, sine = load(cosines, row * half + dim), load(sines, row * half + dim)
                first, second = load(heads, low + dim), load(heads, low + half + dim)
                first, second = turned_by(cosine, sine, first, second)
                store(heads, low + dim, first)
                store(heads, low + half + dim, second)
