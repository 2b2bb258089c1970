"""Makes Triton's interpreter faster, for tests that run many small kernels.

Owns: `cache_interpreter` and `omit_overflow_checks`. Invariant: kernels compute the same values; what is changed is Triton's own
bookkeeping. `triton.language` stays as the interpreter needs it, where Triton replaces its functions anew for each launch and each
call of a device function; and the numpy type of an element and the shape of a tensor are computed once.

Both functions do nothing where kernels are compiled. They change Triton for the rest of the process.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

import triton
from triton import language as tl
from triton.runtime import interpreter


class _Kept:
    """In place of Triton's list of replaced functions: keeps them replaced."""

    def restore(self) -> None:
        """No-op."""


def cache_interpreter() -> None:
    """Lets the interpreter do once what it otherwise does in each launch. Idempotent."""
    if not triton.knobs.runtime.interpret or interpreter._patch_lang is _patch_lang:
        return
    # Triton replaces functions in those modules that the function's globals name.
    interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _cached_type(interpreter._get_np_dtype)
    tl.block_type.__init__ = _cached_block(tl.block_type.__init__)
    tl.tensor.__init__ = _cached_shape(tl.tensor.__init__)


def omit_overflow_checks() -> None:
    """Integers that leave the range of their type are noticed no more. Those of small steps cannot."""
    if triton.knobs.runtime.interpret:
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_lang(_: object) -> _Kept:
    return _Kept()


def _cached_type(compute: Any) -> Any:
    types: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        element = kind.scalar
        if element.is_ptr():
            return compute(element)
        if element.name not in types:
            types[element.name] = compute(element)
        return types[element.name]

    return get


def _cached_block(initialize: Any) -> Any:
    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def create(block: Any, element: Any, shape: Any) -> None:
        key = tuple(shape)
        if key not in blocks:
            initialize(block, element, shape)
            blocks[key] = (block.shape, block.numel, str(block.shape))
        block.element_ty = element
        block.shape, block.numel, text = blocks[key]
        block.name = f"<{text}, {element}>"

    return create


def _cached_shape(initialize: Any) -> Any:
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def create(tensor: Any, handle: Any, kind: Any) -> None:
        key = tuple(kind.shape) if kind.is_block() else ()
        if key not in shapes:
            initialize(tensor, handle, kind)
            shapes[key] = (tensor.shape, tensor.numel)
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.shape, tensor.numel = shapes[key]

    return create
