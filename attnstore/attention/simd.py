"""Sixteen fp32 lanes as a numba value, for loops that LLVM does not vectorise well by itself.

Owns: `Lanes` and its operations. The attention kernel is bound by a few instructions per key. numba has no bf16 and cannot rule out
aliasing, so it vectorises neither a dot product over short rows nor the `exp2` that follows.
Invariant: every operation is a few LLVM instructions or intrinsics on `<16 x float>`; LLVM splits them for narrower machines (two
AVX2 registers, four NEON registers). Only `dot` names an instruction set, and uses it only if this machine has it.

Arrays are one-dimensional and indexed by element, without bounds check. Element types: float32; bf16 as uint16; fp16 as int16.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

from typing import Any, Final

import torch
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES: Final = 16

ELEMENTS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
"""The array type that stands for an element type in the kernels, because numba has neither bf16 nor fp16."""

_F16, _F32, _I16, _I32 = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
VECTOR = ir.VectorType(_F32, LANES)
INT_VECTOR = ir.VectorType(_I32, LANES)
_LOADED: Final = {types.uint16: _I16, types.int16: _F16, types.float32: _F32}


class Lanes(types.Type):
    """The numba type of `<16 x float>`."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: ir.Type) -> Any:
    """Returns the address of `array[index]`, as a pointer to `vector`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any], **flags: Any) -> Any:
    """Calls LLVM's intrinsic of that name."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments, **flags)


def constant(value: float) -> Any:
    """Returns sixteen copies of a compile-time constant."""
    return ir.Constant(VECTOR, [value] * LANES)


def _shuffle(builder: Any, first: Any, second: Any, picks: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(picks)), picks))


@intrinsic
def load(typingctx, array, index):
    """Loads `array[index : index + 16]`, widened to fp32."""

    def codegen(context, builder, signature, args):
        element = signature.args[0].dtype
        source = ir.VectorType(_LOADED[element], LANES)
        value = builder.load(address(context, builder, signature.args[0], args[0], args[1], source))
        value.align = element.bitwidth // 8
        return _widened(builder, value, _LOADED[element])

    return lanes(array, types.intp), codegen


def _widened(builder: Any, value: Any, element: ir.Type) -> Any:
    """Returns sixteen elements as fp32."""
    if element == _I16:  # bf16 is the upper half of an fp32
        shift = ir.Constant(INT_VECTOR, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(value, INT_VECTOR), shift), VECTOR)
    return builder.fpext(value, VECTOR) if element == _F16 else value


@intrinsic
def store(typingctx, array, index, value):
    """Stores `array[index : index + 16] = value`, rounded to the nearest value of the array's type, ties to even."""

    def codegen(context, builder, signature, args):
        element = signature.args[0].dtype
        value = args[2]
        if element == types.uint16:
            value = _rounded_to_bf16(builder, value)
        elif element == types.int16:
            value = builder.fptrunc(value, ir.VectorType(_F16, LANES))
        target = address(context, builder, signature.args[0], args[0], args[1], value.type)
        builder.store(value, target).align = element.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def move(typingctx, target, i, source, j):
    """Copies `target[i : i + 16] = source[j : j + 16]` between arrays of one type. numba's own loop checks every index for being
    negative.
    """

    def codegen(context, builder, signature, args):
        element = signature.args[0].dtype
        sixteen = ir.VectorType(_LOADED[element], LANES)
        value = builder.load(address(context, builder, signature.args[2], args[2], args[3], sixteen))
        value.align = element.bitwidth // 8
        builder.store(value, address(context, builder, signature.args[0], args[0], args[1], sixteen)).align = value.align
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), codegen


@intrinsic
def interleave(typingctx, target, i, source, j, k, keeps_first, keeps_second):
    """Sets `target[i : i + 32]` to alternating elements of `source` from `j` on and from `k` on, with zeros for masked ones.

    All bf16 or fp16.
    """

    def codegen(context, builder, signature, args):
        sixteen = ir.VectorType(_I16, LANES)
        parts = []
        for index, keeps in ((args[3], args[5]), (args[4], args[6])):
            value = builder.load(address(context, builder, signature.args[2], args[2], index, sixteen))
            value.align = 2
            parts.append(builder.select(keeps, value, ir.Constant(sixteen, [0] * LANES)))
        value = _shuffle(builder, parts[0], parts[1], [lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)])
        builder.store(value, address(context, builder, signature.args[0], args[0], args[1], value.type)).align = 2
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp, types.boolean, types.boolean), codegen


@intrinsic
def transpose_pairs(typingctx, target, i, stride, source, j, step):
    """Transposes sixteen pairs of elements of four rows: `target[i + p * stride + 2 * r + e] = source[j + r * step + 2 * p + e]`.

    All bf16 or fp16.
    """

    def codegen(context, builder, signature, args):
        target, i, stride, source, j, step = args
        pairs = ir.VectorType(_I32, LANES)
        rows = []
        for row in range(4):
            at = builder.add(j, builder.mul(step, ir.Constant(j.type, row)))
            value = builder.load(address(context, builder, signature.args[3], source, at, pairs))
            value.align = 2
            rows.append(value)
        turns = [lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)]
        first, second = _shuffle(builder, rows[0], rows[1], turns), _shuffle(builder, rows[2], rows[3], turns)
        for pair in range(LANES):
            four = _shuffle(builder, first, second, [2 * pair, 2 * pair + 1, 2 * LANES + 2 * pair, 2 * LANES + 2 * pair + 1])
            at = builder.add(i, builder.mul(stride, ir.Constant(i.type, pair)))
            builder.store(four, address(context, builder, signature.args[0], target, at, four.type)).align = 2
        return context.get_dummy_value()

    index = types.intp
    return types.void(target, index, index, source, index, index), codegen


def _rounded_to_bf16(builder: Any, value: Any) -> Any:
    """Rounds to the nearest bf16, ties to even; a NaN stays NaN."""
    if HAS_BF16_PRODUCTS:
        numbers = ir.VectorType(_BFloat(), LANES)
        return builder.bitcast(call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", numbers, [value]), ir.VectorType(_I16, LANES))
    # Adds half a unit of the upper half, then keeps the upper half of each fp32.
    bits = builder.bitcast(value, INT_VECTOR)
    half, one, shift = (ir.Constant(INT_VECTOR, [number] * LANES) for number in (0x7FFF, 1, 16))
    odd = builder.and_(builder.lshr(bits, shift), one)
    rounded = builder.lshr(builder.add(bits, builder.add(half, odd)), shift)
    nan = ir.Constant(INT_VECTOR, [0x7FC0] * LANES)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
    return builder.trunc(rounded, ir.VectorType(_I16, LANES))


@intrinsic
def splat(typingctx, scalar):
    """Returns sixteen copies of an fp32 scalar."""

    return lanes(types.float32), lambda context, builder, signature, args: splatted(builder, args[0])


def splatted(builder: Any, scalar: Any) -> Any:
    """Returns sixteen copies of a 32-bit scalar."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, scalar, ir.Constant(_I32, 0)), undefined, [0] * LANES)


@intrinsic
def fma(typingctx, x, y, z):
    """`x * y + z`, rounded once."""
    return lanes(x, y, z), lambda context, builder, signature, args: call(builder, f"llvm.fma.v{LANES}f32", VECTOR, list(args))


class _BFloat(ir.Type):
    """LLVM's bf16, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_FEATURES: Final = binding.get_host_cpu_features()
HAS_32_REGISTERS: Final = bool(_FEATURES.get("avx512f", False))
"""This machine has 32 registers of sixteen fp32 lanes (AVX-512)."""

HAS_BF16_PRODUCTS: Final = bool(_FEATURES.get("avx512bf16", False))
"""This machine multiplies pairs of bf16 and adds them to fp32 in one instruction (AVX512-BF16)."""


def bf16_products(builder: Any, sums: Any, x: Any, y: Any) -> Any:
    """Returns `sums` plus the products of two vectors of 32 bf16, two per lane; requires `HAS_BF16_PRODUCTS`."""
    numbers = ir.VectorType(_BFloat(), 2 * LANES)
    operands = [sums, builder.bitcast(x, numbers), builder.bitcast(y, numbers)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, operands)


@intrinsic
def dot(typingctx, x, i, y, j, sums):
    """Returns `sums` plus 32 products, `x[i : i + 32] * y[j : j + 32]`, two per lane. Both arrays have one type.

    bf16 uses one instruction if the machine has it (AVX512-BF16).
    """

    def codegen(context, builder, signature, args):
        x_type, _, y_type, _, _ = signature.args
        first = load_pairs(context, builder, x_type, args[0], args[1])
        second = load_pairs(context, builder, y_type, args[2], args[3])
        return products(builder, args[4], first, second)

    return lanes(x, types.intp, y, types.intp, sums), codegen


def load_pairs(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Loads `array[index : index + 32]` without conversion."""
    pairs = ir.VectorType(_LOADED[array_type.dtype], 2 * LANES)
    value = builder.load(address(context, builder, array_type, array, index, pairs))
    value.align = array_type.dtype.bitwidth // 8
    return value


def products(builder: Any, sums: Any, x: Any, y: Any) -> Any:
    """Returns `sums` plus the products of two vectors of 32 elements, two per lane."""
    element = x.type.element
    if element == _I16 and HAS_BF16_PRODUCTS:
        return bf16_products(builder, sums, x, y)
    for begin in (0, LANES):
        half = list(range(begin, begin + LANES))
        factors = [_widened(builder, _shuffle(builder, part, part, half), element) for part in (x, y)]
        sums = call(builder, f"llvm.fma.v{LANES}f32", VECTOR, [*factors, sums])
    return sums


@intrinsic
def add(typingctx, x, y):
    """`x + y`."""
    return lanes(x, y), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def sub(typingctx, x, y):
    """`x - y`."""
    return lanes(x, y), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def mul(typingctx, x, y):
    """`x * y`."""
    return lanes(x, y), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def divide(typingctx, x, y):
    """`x / y`."""
    return lanes(x, y), lambda context, builder, signature, args: builder.fdiv(*args)


@intrinsic
def maximum(typingctx, x, y):
    """The larger of each pair; undefined for NaN."""
    return lanes(x, y), lambda context, builder, signature, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@intrinsic
def largest(typingctx, x):
    """The largest lane, as a scalar; undefined for NaN."""

    def codegen(context, builder, signature, args):
        return call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", _F32, [args[0]], fastmath=("nnan",))

    return types.float32(x), codegen


@intrinsic
def total(typingctx, x):
    """The sum of the lanes, as a scalar, in any order."""

    def codegen(context, builder, signature, args):
        zero = ir.Constant(_F32, 0.0)
        return call(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", _F32, [zero, args[0]], fastmath=("reassoc",))

    return types.float32(x), codegen


@intrinsic
def store_totals(typingctx, array, index, w, x, y, z):
    """Stores `array[index : index + 4] = total(w), total(x), total(y), total(z)`, with a third of the shuffles of four `total`s."""

    def codegen(context, builder, signature, args):
        four = four_totals(builder, args[2:])
        builder.store(four, address(context, builder, signature.args[0], args[0], args[1], four.type)).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, w, x, y, z), codegen


def four_totals(builder: Any, vectors: Any) -> Any:
    """Returns the sums of the lanes of four vectors, as one vector."""

    def halved(first: Any, second: Any, width: int) -> Any:
        """Adds neighbouring groups of `width` lanes: returns the sums of `first`, then those of `second`."""
        lower = [group + lane for group in range(0, 2 * LANES, 2 * width) for lane in range(width)]
        upper = [lane + width for lane in lower]
        return builder.fadd(_shuffle(builder, first, second, lower), _shuffle(builder, first, second, upper))

    w, x, y, z = vectors
    sums = halved(halved(w, x, 8), halved(y, z, 8), 4)
    for distance in (2, 1):
        sums = builder.fadd(sums, _shuffle(builder, sums, sums, [lane ^ distance for lane in range(LANES)]))
    return _shuffle(builder, sums, sums, [0, 4, 8, 12])


@intrinsic
def prefetch(typingctx, array, index):
    """Prefetches the cache line of `array[index]` without waiting for it."""

    def codegen(context, builder, signature, args):
        request_line(builder, address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def request_line(builder: Any, pointer: Any) -> None:
    """Prefetches the cache line at an address."""
    read, locality, data_cache = (ir.Constant(_I32, value) for value in (0, 2, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, locality, data_cache])
