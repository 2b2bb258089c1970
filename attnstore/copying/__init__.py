"""Copies bytes between memories, and says the checksums of what it copied; or hashes what lies there.

Owns: `copy`, `checksums`, `address_of`, and which of two ways a copy goes.
Invariants: the checksums are those of the bytes which the destination has now, whatever happens to the source meanwhile, so a page
whose checksum is right *is* the page. Those of the layers are made of the same bytes, or of what lay there just before: memory that
changed in between gives a page's checksum that is wrong.

Where numba is installed, a process that copies or hashes much compiles one loop for all of it (`attnstore.copying.kernel`), which
hides the checksums behind the memory; others copy first and read what they copied twice more.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from typing import Final

from attnstore.core.hashing import CHECKSUM_BLOCK_BYTES, LAYER_CHECKSUM_BYTES, layer_checksums, page_checksum
from attnstore.limits import MIB
from attnstore.logs import get_logger

_MUCH_BYTES: Final = 64 * MIB
"""Copied or hashed by a process before it compiles anything."""
_LINE_BYTES: Final = 64
_PYBUF_SIMPLE: Final = 0

_log = get_logger(__name__)
_addressof = ctypes.addressof
_from_buffer = ctypes.c_char.from_buffer
_Compiled = Callable[[int, int, int, int, int, int], int]


Checksums = tuple[int, bytes]
"""The `page_checksum` of a page or of a range of its layers, and the `layer_checksums` of these. A plain tuple, because a named one
takes as long to make as a small page to hash.
"""


def copy(destination: memoryview, source: int, layer_bytes: int, *, soon_used: bool = False) -> Checksums:
    """Fills `destination`, writable and contiguous, from address `source` on; the checksums of what it holds then.

    Without the interpreter lock, so that several threads copy at once. `soon_used` leaves the bytes in the processor's cache;
    otherwise they go past it where that is faster. The source must not overlap, and must stay mapped. `destination` is a whole
    number of layers.
    """
    target = _addressof(_from_buffer(destination))
    compiled = _compilation.result
    if compiled is not None and layer_bytes % CHECKSUM_BLOCK_BYTES == 0:
        return _run(compiled, source, len(destination), layer_bytes, target, 1 if soon_used or target % _LINE_BYTES else 2)
    ctypes.memmove(target, source, len(destination))
    _compilation.count(len(destination))
    return _read(destination, layer_bytes)


def checksums(data: memoryview, layer_bytes: int) -> Checksums:
    """The checksums of contiguous bytes where they lie, a whole number of layers. Without the interpreter lock."""
    if layer_bytes < len(data):
        compiled = _compilation.result
        if compiled is not None and layer_bytes % CHECKSUM_BLOCK_BYTES == 0:
            source = address_of(data) if data.readonly else _addressof(_from_buffer(data))
            return _run(compiled, source, len(data), layer_bytes, 0, 0)
        _compilation.count(len(data))
    return _read(data, layer_bytes)


def _read(data: memoryview, layer_bytes: int) -> Checksums:
    if layer_bytes == len(data):
        whole = page_checksum(data)
        return whole, whole.to_bytes(LAYER_CHECKSUM_BYTES, "little")
    of_layers = layer_checksums(data, layer_bytes)  # first: see the module
    return page_checksum(data), of_layers


def _run(compiled: _Compiled, source: int, size_bytes: int, layer_bytes: int, target: int, how: int) -> Checksums:
    if layer_bytes == size_bytes:
        whole = compiled(source, 1, layer_bytes, 0, target, how)
        return whole, whole.to_bytes(LAYER_CHECKSUM_BYTES, "little")
    layers = size_bytes // layer_bytes
    of_layers = bytearray(LAYER_CHECKSUM_BYTES * layers)
    whole = compiled(source, layers, layer_bytes, _addressof(_from_buffer(of_layers)), target, how)
    return whole, bytes(of_layers)


def prepare() -> None:
    """Compiles the loop now, for a process that knows that it will copy much. Nothing happens where numba is not installed."""
    if _can_compile():
        _compilation.compile()


class _Buffer(ctypes.Structure):
    """CPython's `Py_buffer`, which is part of the stable ABI since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(view: memoryview) -> int:
    """Where a contiguous view's bytes are; good for as long as the view is alive. (ctypes itself refuses read-only memory.)"""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), _PYBUF_SIMPLE)
    address = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    assert address is not None
    return int(address)


class _Compilation:
    """Compiles on a thread of its own, once the process has copied or hashed enough for it to pay; nobody waits for it."""

    def __init__(self, much_bytes: int) -> None:
        self.result: _Compiled | None = None
        """The loop, as soon as there is one."""
        self._left_bytes = much_bytes
        self._lock = threading.Lock()

    def count(self, size_bytes: int) -> None:
        """So many bytes were copied or hashed without it."""
        if self._left_bytes <= 0:
            return
        with self._lock:
            begins = 0 < self._left_bytes <= size_bytes
            self._left_bytes -= size_bytes
        if begins and _can_compile():
            # Not a daemon: a process that ended amid LLVM's work would crash.
            threading.Thread(target=self.compile, name="attnstore-compile").start()

    def compile(self) -> None:
        """Takes half a second, and a whole one where nothing is cached."""
        try:
            from attnstore.copying.kernel import hash_layers
        except Exception as error:  # whatever a library of compilers finds wrong with this machine: copies need none of it
            _log.warning("pages are copied without the compiled loop", reason=f"{type(error).__name__}: {error}")
        else:
            self.result = hash_layers


def _can_compile() -> bool:
    return importlib.util.find_spec("numba") is not None


_compilation = _Compilation(_MUCH_BYTES)
