"""Memory fences for a stamp and the bytes next to it, which another process reads.

Owns: `write_fence` and `read_fence`, for every writer or reader of a stamp. Invariant: the writer changes the stamp, fences and
then writes bytes; the reader uses bytes, fences and then reads the stamp. A reader that finds the old stamp has then used no new
byte (Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012).

Python has no fence, so locks serve as fences: accesses before a lock's release stay before it, accesses after a lock's acquisition
stay after it, and on x86-64 and aarch64 a release and a later acquisition keep their order. Taking a lock twice, one time after the
other, thus keeps all accesses before from all accesses after.
"""

from __future__ import annotations

import platform
import threading
from typing import Final

_LOADS_IN_ORDER: Final = frozenset({"x86_64", "amd64", "i386", "i686"})
"""Machines that never reorder two loads. Non-temporal stores may be reordered on them, so writers still fence."""


def write_fence() -> None:
    """Orders all earlier stores of this thread before all its later stores."""
    lock = threading.Lock()  # a lock of its own, so that no thread waits for it
    lock.acquire()
    lock.release()
    lock.acquire()
    lock.release()


def _nothing() -> None:
    """No-op: the machine orders loads by itself."""


read_fence: Final = _nothing if platform.machine().lower() in _LOADS_IN_ORDER else write_fence
"""`read_fence()`: orders all earlier loads of this thread before all its later loads."""
