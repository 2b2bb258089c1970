"""Copies bytes between memories, and says the checksum of what it copied.

Owns: `copy`, `address_of`, and which of two ways a copy goes. Invariant: the checksum is that of the bytes which the destination
has now, whatever happens to the source meanwhile, so a page whose checksum is right *is* the page.

Where numba is installed, a process that copies much compiles one loop for both (`attnstore.copying.kernel`), which hides the
checksum behind the memory; others copy first and read what they copied once more.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from typing import Final

from attnstore.core.hashing import page_checksum
from attnstore.limits import MIB
from attnstore.logs import get_logger

_MUCH_BYTES: Final = 64 * MIB
"""Copied by a process before it compiles anything."""
_COMPILED_BYTES_MIN: Final = 1024
_PYBUF_SIMPLE: Final = 0

_log = get_logger(__name__)
_addressof = ctypes.addressof
_from_buffer = ctypes.c_char.from_buffer
_Compiled = Callable[[int, int, int, bool], int]


def copy(destination: memoryview, source: int, *, soon_used: bool = False) -> int:
    """Fills `destination`, writable and contiguous, from address `source` on; the `page_checksum` of what it holds then.

    Without the interpreter lock, so that several threads copy at once. `soon_used` leaves the bytes in the processor's cache;
    otherwise they go past it where that is faster. The source must not overlap, and must stay mapped.
    """
    size_bytes = len(destination)
    target = _addressof(_from_buffer(destination))
    compiled = _compilation.result
    if compiled is not None and size_bytes >= _COMPILED_BYTES_MIN:
        return compiled(target, source, size_bytes, not soon_used)
    ctypes.memmove(target, source, size_bytes)
    _compilation.count(size_bytes)
    return page_checksum(destination)


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
    """Compiles on a thread of its own, once the process has copied enough for it to pay; nobody waits for it."""

    def __init__(self, much_bytes: int) -> None:
        self.result: _Compiled | None = None
        """The loop, as soon as there is one."""
        self._left_bytes = much_bytes
        self._lock = threading.Lock()

    def count(self, size_bytes: int) -> None:
        """So many bytes were copied without it."""
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
            from attnstore.copying.kernel import copy_and_hash
        except Exception as error:  # whatever a library of compilers finds wrong with this machine: copies need none of it
            _log.warning("pages are copied without the compiled loop", reason=f"{type(error).__name__}: {error}")
        else:
            self.result = copy_and_hash


def _can_compile() -> bool:
    return importlib.util.find_spec("numba") is not None


_compilation = _Compilation(_MUCH_BYTES)
