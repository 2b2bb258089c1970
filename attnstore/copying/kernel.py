"""One loop, compiled by numba, that hashes a page and each of its layers and optionally copies it.

Owns: `hash_layers`. Source of the algorithm: Yann Collet, XXH3, https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md; the case of
more than 240 bytes with seed 0 and the default secret. XXH3 accumulates blocks of 1,024 bytes, and the contribution of a block does
not depend on earlier blocks. If layers are whole blocks, one pass therefore computes the checksums of the page and of its layers at
the price of the page's.
A copy waits for memory, so the arithmetic costs nothing. Non-temporal stores save reading the lines that they overwrite; the C
library's `memcpy` uses them only for copies of several megabytes.
Invariant: each byte is read from the source once; the same value is stored and hashed, for page and layer alike.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-unimported,misc,no-any-return"

from __future__ import annotations

import struct
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from attnstore.copying.compiled import compiled_for
from attnstore.core.hashing import CHECKSUM_BLOCK_BYTES

_STRIPE_BYTES: Final = 64
_STRIPES: Final = CHECKSUM_BLOCK_BYTES // _STRIPE_BYTES
"""Of a block; the accumulators are scrambled after them."""
_STEP_BYTES: Final = 8
"""The offset of the secret per stripe."""

_SECRET_HEX: Final = (
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SECRET: Final = bytes.fromhex(_SECRET_HEX)
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_AVALANCHE: Final = 0x165667919E3779F9
_SUMS: Final = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)

_SCRAMBLE, _LAST, _MERGE = range(_STRIPES, _STRIPES + 3)
"""The indexes of the keys that do not belong to a stripe."""
_KEYS_AT: Final = (*range(0, _STRIPES * _STEP_BYTES, _STEP_BYTES), 128, 121, 11)
"""The offset of each key in the secret."""

_U64 = ir.IntType(64)
_LANES: Final = 8
_VECTOR = ir.VectorType(_U64, _LANES)


class _Words(types.Type):
    """The numba type of `<8 x u64>`: one stripe."""

    def __init__(self) -> None:
        super().__init__(name="uint64x8")


_words = _Words()
_TABLE: Final = "attnstore.xxh3.keys"


@register_model(_Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _splat(number: int) -> Any:
    return ir.Constant(_VECTOR, [number] * _LANES)


@intrinsic
def _first_sums(typingctx):
    """The initial accumulators."""
    return _words(), lambda context, builder, signature, args: ir.Constant(_VECTOR, list(_SUMS))


@intrinsic
def _key(typingctx, number):
    """Returns a key from a table aligned to cache lines: in the secret most keys cross two lines, and loading them costs 10% more
    time.
    """

    def codegen(context, builder, signature, args):
        table = builder.module.globals.get(_TABLE)
        if table is None:
            keys = [ir.Constant(_VECTOR, list(struct.unpack_from(f"<{_LANES}Q", _SECRET, at))) for at in _KEYS_AT]
            rows = ir.Constant(ir.ArrayType(_VECTOR, len(keys)), keys)
            table = ir.GlobalVariable(builder.module, rows.type, _TABLE)
            table.initializer, table.global_constant, table.linkage, table.align = rows, True, "internal", _STRIPE_BYTES
        value = builder.load(builder.gep(table, [ir.Constant(_U64, 0), args[0]]))
        value.align = _STRIPE_BYTES
        return value

    return _words(types.intp), codegen


@intrinsic
def _load(typingctx, address):
    """Loads the 64 bytes at an address."""

    def codegen(context, builder, signature, args):
        value = builder.load(builder.inttoptr(args[0], _VECTOR.as_pointer()))
        value.align = 1
        return value

    return _words(types.intp), codegen


@intrinsic
def _store(typingctx, address, words):
    """Stores 64 bytes at an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], _VECTOR.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.intp, words), codegen


@intrinsic
def _stream(typingctx, address, words):
    """Stores 64 bytes at an address that is a multiple of 64, bypassing the cache."""

    def codegen(context, builder, signature, args):
        store = builder.store(args[1], builder.inttoptr(args[0], _VECTOR.as_pointer()))
        store.align = _STRIPE_BYTES
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(types.intp, words), codegen


@intrinsic
def _fence(typingctx):
    """Orders non-temporal stores before every later store."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _put(typingctx, address, number):
    """Stores a number at an address that is a multiple of 8."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], _U64.as_pointer())).align = 8
        return context.get_dummy_value()

    return types.void(types.intp, types.uint64), codegen


@intrinsic
def _no_sums(typingctx):
    """The initial accumulators of a block of its own."""
    return _words(), lambda context, builder, signature, args: ir.Constant(_VECTOR, [0] * _LANES)


@intrinsic
def _added(typingctx, sums, more):
    """Adds two sets of accumulators."""
    return _words(sums, more), lambda context, builder, signature, args: builder.add(*args)


@intrinsic
def _accumulated(typingctx, sums, data, key):
    """Returns the accumulators after one stripe."""

    def codegen(context, builder, signature, args):
        sums, data, key = args
        mixed = builder.xor(data, key)
        low, high = builder.and_(mixed, _splat(0xFFFF_FFFF)), builder.lshr(mixed, _splat(32))
        neighbours = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [lane ^ 1 for lane in range(_LANES)])
        swapped = builder.shuffle_vector(data, data, neighbours)
        return builder.add(builder.add(sums, swapped), builder.mul(low, high))

    return _words(sums, data, key), codegen


@intrinsic
def _scrambled(typingctx, sums, key):
    """Returns the accumulators after one block."""

    def codegen(context, builder, signature, args):
        sums, key = args
        mixed = builder.xor(builder.xor(sums, builder.lshr(sums, _splat(47))), key)
        return builder.mul(mixed, _splat(_P32_1))

    return _words(sums, key), codegen


@intrinsic
def _merged(typingctx, sums, key, size_bytes):
    """Returns the checksum for the accumulators."""

    def codegen(context, builder, signature, args):
        sums, key, size_bytes = args
        u128 = ir.IntType(128)
        mixed = builder.xor(sums, key)
        result = builder.mul(size_bytes, ir.Constant(_U64, _P64_1))
        for lane in range(0, _LANES, 2):
            pair = [builder.extract_element(mixed, ir.Constant(ir.IntType(32), lane + side)) for side in range(2)]
            product = builder.mul(*(builder.zext(factor, u128) for factor in pair))
            high = builder.trunc(builder.lshr(product, ir.Constant(u128, 64)), _U64)
            result = builder.add(result, builder.xor(builder.trunc(product, _U64), high))
        result = builder.xor(result, builder.lshr(result, ir.Constant(_U64, 37)))
        result = builder.mul(result, ir.Constant(_U64, _AVALANCHE))
        return builder.xor(result, builder.lshr(result, ir.Constant(_U64, 32)))

    return types.uint64(sums, key, types.intp), codegen


@compiled_for(types.uint64(types.intp, types.intp, types.intp, types.intp, types.intp, types.intp))
def hash_layers(source, layers, layer_bytes, checksums, target, how):
    """Computes the XXH3-64 of `layers` times `layer_bytes` from address `source`; that of each layer is stored at `checksums`, u64
    each.

    `layer_bytes` is a multiple of 1,024; `checksums` is a multiple of 8, or 0 for none. how: 0 copies nothing, 1 copies to address
    `target`, 2 does so bypassing the cache, which requires a `target` that is a multiple of 64.
    """
    scramble, last, merge = _key(_SCRAMBLE), _key(_LAST), _key(_MERGE)
    blocks = layer_bytes // CHECKSUM_BLOCK_BYTES
    page = _first_sums()
    checksum = types.uint64(0)
    at = 0
    for layer in range(layers):
        sums = _first_sums()
        for block in range(blocks):
            own = _no_sums()
            words = _load(source + at)
            for stripe in range(_STRIPES):
                words = _load(source + at)
                if how == 1:
                    _store(target + at, words)
                elif how == 2:
                    _stream(target + at, words)
                if stripe < _STRIPES - 1:
                    own = _accumulated(own, words, _key(stripe))
                at += _STRIPE_BYTES
            if block == blocks - 1:
                # The last stripe of the whole input has its own key, and nothing is scrambled after it.
                end = _accumulated(own, words, last)
                if checksums:
                    _put(checksums + 8 * layer, _merged(_added(sums, end), merge, layer_bytes))
                if layer == layers - 1:
                    checksum = _merged(_added(page, end), merge, layers * layer_bytes)
            own = _accumulated(own, words, _key(_STRIPES - 1))
            page = _scrambled(_added(page, own), scramble)
            sums = _scrambled(_added(sums, own), scramble)
    if how == 2:
        _fence()
    return checksum
