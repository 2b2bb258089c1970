"""Products of a few rows with the rows of a matrix, each in one pass over both.

Owns: `dot_rows` and `dot_rows_ahead`. With about eight rows or more, a step is bound by the machine's loads, not by memory: one
load must serve several products, so ROWS x OUTPUTS sums are kept in registers if there are enough. Invariant: sums are fp32; both
factors have one type, bf16, fp16 or fp32.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from attnstore.attention.simd import (
    HAS_32_REGISTERS,
    LANES,
    VECTOR,
    address,
    four_totals,
    load_pairs,
    products,
    request_line,
)

ROWS: Final = 4
OUTPUTS: Final = 4
COLUMNS: Final = 2 * LANES
"""Row lengths are multiples of it."""

_TOGETHER: Final = OUTPUTS if HAS_32_REGISTERS else 1
"""Outputs whose sums are in registers at the same time."""


def _dot_rows(ahead_bytes: int) -> Any:
    @intrinsic
    def dots(typingctx, weights, weight, inputs, row, width, outputs, output, stride):
        """Sets `outputs[output + r * stride + n] = inputs[row + r * width :] . weights[weight + n * width :]` for ROWS and OUTPUTS.

        Products have `width` elements, a multiple of COLUMNS. outputs: fp32.
        """

        def codegen(context, builder, signature, args):
            weights_type, inputs_type, outputs_type = (signature.args[place] for place in (0, 2, 5))
            weights, weight, inputs, row, width, outputs, output, stride = args
            index = weight.type

            def number(value: int) -> Any:
                return ir.Constant(index, value)

            def behind(begin: Any, count: int, distance: Any, offset: Any) -> Any:
                return builder.add(builder.add(begin, builder.mul(distance, number(count))), offset)

            zero = ir.Constant(VECTOR, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(OUTPUTS)] for _ in range(ROWS)]
            for first in range(0, OUTPUTS, _TOGETHER):
                numbers = range(first, first + _TOGETHER)
                with cgutils.for_range(builder, builder.sdiv(width, number(COLUMNS)), intp=index) as loop:
                    column = builder.mul(loop.index, number(COLUMNS))
                    read = []
                    for n in numbers:
                        at = behind(weight, n, width, column)
                        read.append(load_pairs(context, builder, weights_type, weights, at))
                        if ahead_bytes:
                            line = builder.add(at, number(ahead_bytes * 8 // weights_type.dtype.bitwidth))
                            request_line(builder, address(context, builder, weights_type, weights, line, ir.IntType(8)))
                    for r in range(ROWS):
                        given = load_pairs(context, builder, inputs_type, inputs, behind(row, r, width, column))
                        for n, part in zip(numbers, read, strict=True):
                            builder.store(products(builder, builder.load(sums[r][n]), given, part), sums[r][n])
            for r in range(ROWS):
                four = four_totals(builder, [builder.load(each) for each in sums[r]])
                target = builder.add(output, builder.mul(stride, number(r)))
                builder.store(four, address(context, builder, outputs_type, outputs, target, four.type)).align = 4
            return context.get_dummy_value()

        index = types.intp
        return types.void(weights, index, inputs, index, index, outputs, index, index), codegen

    return dots


dot_rows: Final = _dot_rows(0)
"""For weights that are in the cache."""

dot_rows_ahead: Final = _dot_rows(4608)
"""Prefetches the following weights; the distance is measured."""
