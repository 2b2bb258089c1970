"""Copies bytes between memories and returns the checksums of what it copied, or hashes bytes in place.

Owns: `copy`, `checksums`, `address_of`, and the choice between two implementations.
Invariants: the page's checksum is computed from the bytes that the destination has now, whatever happens to the source meanwhile,
so a page with the right checksum *is* the page. The checksums of the layers are computed from the same bytes or from those read
just before: if memory changed in between, the page's checksum is wrong.

If numba is installed, a process that copies or hashes much compiles one loop for everything (`attnstore.copying.kernel`), which
hides the hashing behind the memory accesses. Other processes copy first and then read the copy twice more.
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
"""Bytes copied or hashed by a process before it compiles anything."""
_LINE_BYTES: Final = 64
_PYBUF_SIMPLE: Final = 0

_log = get_logger(__name__)
_addressof = ctypes.addressof
_from_buffer = ctypes.c_char.from_buffer
_Compiled = Callable[[int, int, int, int, int, int], int]


Checksums = tuple[int, bytes]
"""The `page_checksum` of a page or of a range of its layers, and their `layer_checksums`. A plain tuple, because creating a named
tuple takes as long as hashing a small page.
"""


def copy(destination: memoryview, source: int, layer_bytes: int, *, soon_used: bool = False) -> Checksums:
    """Fills `destination`, writable and contiguous, from address `source`. Returns the checksums of what it then contains.

    Releases the interpreter lock, so that several threads copy at once. `soon_used` leaves the bytes in the processor's cache;
    otherwise they bypass it if that is faster. The source must not overlap, and must stay mapped. `destination` is a whole number
    of layers.
    """
    target = _addressof(_from_buffer(destination))
    compiled = _compilation.result
    if compiled is not None and layer_bytes % CHECKSUM_BLOCK_BYTES == 0:
        return _run(compiled, source, len(destination), layer_bytes, target, 1 if soon_used or target % _LINE_BYTES else 2)
    ctypes.memmove(target, source, len(destination))
    _compilation.count(len(destination))
    return _read(destination, layer_bytes)


def checksums(data: memoryview, layer_bytes: int) -> Checksums:
    """Returns the checksums of contiguous bytes in place, a whole number of layers. Releases the interpreter lock."""
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
    of_layers = layer_checksums(data, layer_bytes)  # the layers first: see the module
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
    """Compiles the loop now, for a process that will copy much. No-op without numba."""
    if _can_compile():
        _compilation.compile()


class _Buffer(ctypes.Structure):
    """CPython's `Py_buffer`, part of the stable ABI since 3.11."""

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
    """Returns the address of a contiguous view's bytes, valid while the view is alive. (ctypes itself refuses read-only memory.)"""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), _PYBUF_SIMPLE)
    address = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    assert address is not None
    return int(address)


class _Compilation:
    """Compiles on a thread of its own once the process has copied or hashed enough for it to pay; no caller waits for it."""

    def __init__(self, much_bytes: int) -> None:
        self.result: _Compiled | None = None
        """The loop, once it is compiled."""
        self._left_bytes = much_bytes
        self._lock = threading.Lock()

    def count(self, size_bytes: int) -> None:
        """Counts bytes that were copied or hashed without the loop."""
        if self._left_bytes <= 0:
            return
        with self._lock:
            begins = 0 < self._left_bytes <= size_bytes
            self._left_bytes -= size_bytes
        if begins and _can_compile():
            # Not a daemon: a process that exits while LLVM is running would crash.
            threading.Thread(target=self.compile, name="attnstore-compile").start()

    def compile(self) -> None:
        """Takes half a second, or a whole one if nothing is cached."""
        try:
            from attnstore.copying.kernel import hash_layers
        except Exception as error:  # Whatever fails in the compiler on this machine: copying does not need it.
            _log.warning("pages are copied without the compiled loop", reason=f"{type(error).__name__}: {error}")
        else:
            self.result = hash_layers


def _can_compile() -> bool:
    return importlib.util.find_spec("numba") is not None


_compilation = _Compilation(_MUCH_BYTES)
