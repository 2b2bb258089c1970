"""Weighted sums of the rows of a matrix, for several sets of weights at once, with the sums in registers.

Owns: `sum_rows`, which adds to ROWS results, and `sum_row`, which adds to one. A row that is loaded serves all results, so a
machine is bound by its arithmetic and not by its loads. Invariant: everything is fp32.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from attnstore.attention.dots import ROWS
from attnstore.attention.simd import HAS_32_REGISTERS, LANES, VECTOR, address, call, splatted

_TOGETHER: Final = 4 if HAS_32_REGISTERS else 1
"""Vectors of each result that are in registers at the same time."""


def _sums(results: int) -> Any:
    @intrinsic
    def sums(typingctx, outs, out, stride, keeps, weights, weight, weight_stride, rows, width, begin, end, columns):
        """Sets `outs[out + r * stride :] = outs[out + r * stride :] * keeps[r] + sum over t in [begin, end) of
        weights[weight + r * weight_stride + t] * rows[t * width :]` for each result `r`, over `columns` columns.

        outs, weights, rows: fp32. keeps: fp32 `[results]`. columns: a multiple of LANES, at most `width`.
        """

        def codegen(context, builder, signature, args):
            outs_type, keeps_type, weights_type, rows_type = (signature.args[place] for place in (0, 3, 4, 7))
            outs, out, stride, keeps, weights, weight, weight_stride, rows, width, begin, end, columns = args
            index = out.type

            def number(value: int) -> Any:
                return ir.Constant(index, value)

            def behind(start: Any, count: int, distance: Any) -> Any:
                return builder.add(start, builder.mul(distance, number(count)))

            def panel(first: Any, vectors: int) -> None:
                places = [(result, vector) for result in range(results) for vector in range(vectors)]

                def out_address(result: int, vector: int) -> Any:
                    at = builder.add(builder.add(behind(out, result, stride), first), number(LANES * vector))
                    return address(context, builder, outs_type, outs, at, VECTOR)

                for result, vector in places:
                    factor = builder.load(address(context, builder, keeps_type, keeps, number(result), ir.FloatType()))
                    before = builder.load(out_address(result, vector))
                    before.align = 4
                    builder.store(builder.fmul(before, splatted(builder, factor)), registers[result][vector])
                with cgutils.for_range_slice(builder, begin, end, number(1), intp=index) as (token, _):
                    read = []
                    for vector in range(vectors):
                        at = builder.add(builder.add(builder.mul(token, width), first), number(LANES * vector))
                        read.append(builder.load(address(context, builder, rows_type, rows, at, VECTOR)))
                        read[-1].align = 4
                    for result in range(results):
                        at = builder.add(behind(weight, result, weight_stride), token)
                        scalar = builder.load(address(context, builder, weights_type, weights, at, ir.FloatType()))
                        repeated = splatted(builder, scalar)
                        for vector in range(vectors):
                            register = registers[result][vector]
                            terms = [repeated, read[vector], builder.load(register)]
                            builder.store(call(builder, f"llvm.fma.v{LANES}f32", VECTOR, terms), register)
                for result, vector in places:
                    builder.store(builder.load(registers[result][vector]), out_address(result, vector)).align = 4

            registers = [[cgutils.alloca_once(builder, VECTOR) for _ in range(_TOGETHER)] for _ in range(results)]
            wide = builder.mul(builder.sdiv(columns, number(LANES * _TOGETHER)), number(LANES * _TOGETHER))
            with cgutils.for_range_slice(builder, number(0), wide, number(LANES * _TOGETHER), intp=index) as (first, _):
                panel(first, _TOGETHER)
            with cgutils.for_range_slice(builder, wide, columns, number(LANES), intp=index) as (first, _):
                panel(first, 1)
            return context.get_dummy_value()

        index = types.intp
        given = (outs, index, index, keeps, weights, index, index, rows, index, index, index, index)
        return types.void(*given), codegen

    return sums


sum_rows: Final = _sums(ROWS)
sum_row: Final = _sums(1)
