"""The order of a stamp and the bytes beside it, as another process sees them.

Owns: `write_fence` and `read_fence`, which everyone calls who writes or checks a stamp. Invariant: where the writer changes the
stamp, fences and then writes bytes, and the reader uses bytes, fences and then looks at the stamp, a reader that finds the old
stamp used no new byte (Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012).

Python has no fence, so locks make one: what is before a lock's release stays before it, what is after a lock's acquisition stays
after it, and on x86-64 and aarch64 a release and a later acquisition keep their order. A lock that is held twice, one time after
the other, thus keeps everything before it from everything behind it.
"""

from __future__ import annotations

import platform
import threading
from typing import Final

_LOADS_IN_ORDER: Final = frozenset({"x86_64", "amd64", "i386", "i686"})
"""Machines that never let a load pass an earlier one. Stores past the cache may pass others there, so writers do fence."""


def write_fence() -> None:
    """What this thread stored before comes before all that it stores from now on."""
    lock = threading.Lock()  # of its own: nobody waits for it
    lock.acquire()
    lock.release()
    lock.acquire()
    lock.release()


def _nothing() -> None:
    """The machine does it."""


read_fence: Final = _nothing if platform.machine().lower() in _LOADS_IN_ORDER else write_fence
"""`read_fence()`: what this thread loaded before comes before all that it loads from now on."""
