"""Small matrix products in registers: the inner part of attention over many query rows.

Owns: `tile_4` and `tile_1`. To keep the bf16 unit busy, a block of sums stays in registers while rows of one factor are broadcast
against vectors of the other; compilers do not find this in plain loops. Invariant: sums are fp32 and both factors bf16, two
products per lane and instruction (AVX512-BF16); without that instruction (`HAS_BF16_PRODUCTS`) the kernel does not exist.

The first factor is stored by rows. In the second, two neighbouring rows are interleaved element by element ("pairs"), so that one
lane multiplies both at once.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from attnstore.attention.simd import LANES, VECTOR, address, bf16_products, splatted

ROWS: Final = 6
"""Rows of a tile: with four vectors each, 24 of the 32 registers hold sums."""

_PAIRS: Final = ir.VectorType(ir.IntType(16), 2 * LANES)


def _tile(vectors: int) -> Any:
    @intrinsic
    def tile(typingctx, x, x_at, x_stride, y, y_at, y_stride, pairs, sums, sums_at, sums_stride, keeps):
        """Sets `sums[r, :] = sums[r, :] * keeps[r] + sum over p < 2 * pairs of x[r, p] * y[p, :]` for ROWS rows.

        x: bf16, row `r` begins at `x_at + r * x_stride`. y: bf16, pair `p` begins at `y_at + p * y_stride`. sums: fp32, row `r`
        begins at `sums_at + r * sums_stride`; keeps: fp32 `[ROWS]`, or None, which overwrites `sums`.
        """

        def codegen(context, builder, signature, args):
            x_type, y_type, sums_type, keeps_type = (signature.args[place] for place in (0, 3, 7, 10))
            x, x_at, x_stride, y, y_at, y_stride, pairs, sums, sums_at, sums_stride, keeps = args
            index = x_at.type
            places = [(row, vector) for row in range(ROWS) for vector in range(vectors)]

            def at(begin: Any, stride: Any, count: Any, offset: int = 0) -> Any:
                return builder.add(builder.add(begin, builder.mul(stride, count)), ir.Constant(index, offset))

            def sums_address(row: int, vector: int) -> Any:
                return address(
                    context, builder, sums_type, sums, at(sums_at, sums_stride, ir.Constant(index, row), LANES * vector), VECTOR
                )

            registers = {place: cgutils.alloca_once(builder, VECTOR) for place in places}
            for row, vector in places:
                before = ir.Constant(VECTOR, [0.0] * LANES)
                if keeps_type != types.none:
                    factor = address(context, builder, keeps_type, keeps, ir.Constant(index, row), ir.FloatType())
                    before = builder.load(sums_address(row, vector))
                    before.align = 4
                    before = builder.fmul(before, splatted(builder, builder.load(factor)))
                builder.store(before, registers[row, vector])
            with cgutils.for_range(builder, pairs, intp=index) as loop:
                columns = []
                for vector in range(vectors):
                    place = at(y_at, y_stride, loop.index, 2 * LANES * vector)
                    columns.append(builder.load(address(context, builder, y_type, y, place, _PAIRS)))
                    columns[-1].align = 2
                for row in range(ROWS):
                    place = builder.add(at(x_at, x_stride, ir.Constant(index, row)), builder.shl(loop.index, ir.Constant(index, 1)))
                    pair = builder.load(address(context, builder, x_type, x, place, ir.IntType(32)))
                    pair.align = 2
                    repeated = splatted(builder, pair)
                    for vector in range(vectors):
                        register = registers[row, vector]
                        builder.store(bf16_products(builder, builder.load(register), repeated, columns[vector]), register)
            for place in places:
                builder.store(builder.load(registers[place]), sums_address(*place)).align = 4
            return context.get_dummy_value()

        index = types.intp
        return types.void(x, index, index, y, index, index, index, sums, index, index, keeps), codegen

    return tile


tile_4: Final = _tile(4)
"""64 columns."""

tile_1: Final = _tile(1)
"""16 columns."""
