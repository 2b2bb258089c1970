"""`exp2` and `tanh` of sixteen fp32 lanes, which no library offers to compiled loops.

Owns: both, and the error of each. Source: `exp2` from the exponent's bits and a Taylor series of the fraction.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from llvmlite import ir
from numba.extending import intrinsic

from attnstore.attention.simd import INT_VECTOR, LANES, VECTOR, call, constant, lanes

_EXP2_LOWEST: Final = -126.0
_EXP2_TERMS: Final = tuple(math.log(2) ** power / math.factorial(power) for power in range(6, -1, -1))
"""Taylor terms of `2 ** f` for `f` in [-0.5, 0.5], highest power first; the next term is below 1.2e-7."""


@intrinsic
def exp2(typingctx, x):
    """`2 ** x` for `x <= 127` to 2e-7 relative; exactly 0 below -126."""

    return lanes(x), lambda context, builder, signature, args: _exp2(builder, args[0])


def _exp2(builder: Any, x: Any) -> Any:
    lowest = constant(_EXP2_LOWEST)
    in_range = builder.fcmp_ordered(">", x, lowest)
    clamped = builder.select(in_range, x, lowest)
    whole = call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [clamped])
    power = _polynomial(builder, _EXP2_TERMS, builder.fsub(clamped, whole))
    bias, mantissa_bits = ir.Constant(INT_VECTOR, [127] * LANES), ir.Constant(INT_VECTOR, [23] * LANES)
    exponent = builder.shl(builder.add(builder.fptosi(whole, INT_VECTOR), bias), mantissa_bits)
    return builder.select(in_range, builder.fmul(power, builder.bitcast(exponent, VECTOR)), constant(0.0))


def _polynomial(builder: Any, terms: Sequence[float], x: Any) -> Any:
    """Returns the sum of `terms` times powers of `x`, the highest power first."""
    value = constant(terms[0])
    for term in terms[1:]:
        value = call(builder, f"llvm.fma.v{LANES}f32", VECTOR, [value, x, constant(term)])
    return value


_TANH_SERIES_TO: Final = 0.3
"""Below this magnitude `1 - 2 / (exp(2 * x) + 1)` loses digits, and five terms of the series suffice: the next is below 6e-8."""

_TANH_TERMS: Final = (62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)
"""Taylor terms of `tanh(x) / x` in `x * x`, highest power first."""

_TANH_ONE_FROM: Final = 10.0
"""From this magnitude on, `tanh` is 1 in fp32."""


@intrinsic
def tanh(typingctx, x):
    """`tanh(x)` to 5e-7 relative; a NaN stays one."""

    def codegen(context, builder, signature, args):
        x, one, two = args[0], constant(1.0), constant(2.0)
        highest = constant(_TANH_ONE_FROM)
        clamped = builder.select(builder.fcmp_ordered("<", x, highest), x, highest)
        power = _exp2(builder, builder.fmul(clamped, constant(2 * math.log2(math.e))))
        far = builder.fsub(one, builder.fdiv(two, builder.fadd(power, one)))
        near = builder.fmul(x, _polynomial(builder, _TANH_TERMS, builder.fmul(x, x)))
        magnitude = call(builder, f"llvm.fabs.v{LANES}f32", VECTOR, [x])
        return builder.select(builder.fcmp_unordered("<", magnitude, constant(_TANH_SERIES_TO)), near, far)

    return lanes(x), codegen
