"""Runs compiled work on the threads that torch computes with.

Owns: `run` and `run_apart`. torch's threads (OpenMP's) spin for milliseconds after each operation, waiting for the next. Other
threads on the same cores would compute beside them at half the speed, and waking other threads takes longer than using those that
spin. Invariant: all parts run at once, each on a thread of its own, so they may wait for each other (`barrier`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from attnstore.attention.barrier import SPOILT

_LIBRARIES: Final = ("libgomp", "libiomp5", "libomp")
"""Prefixes of the names of OpenMP's libraries; all have GNU's entry points."""

_Part = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(threads: int, work: Callable[[int], None], counters: npt.NDArray[np.int64] | None = None) -> None:
    """Calls `work(0)` to `work(threads - 1)` at once and returns after the last; raises what one of them raised.

    counters: int64, those of `barrier` at which the parts meet. They are spoilt if a part raises, so that no part waits for it (a
    KeyboardInterrupt may come at any time); the results of the other parts are then useless.

    `work` should release the interpreter lock soon, because the other parts wait for it, and should not call torch: torch's first
    operation on a thread that Python does not know costs 100 us, every time.
    """
    parts = _Parts(work, counters)
    if threads == 1:
        work(0)
    elif (library := _openmp()) is None or not _run_on_torchs_threads(library, threads, parts):
        _run_on_own_threads(threads, parts)


def run_apart(threads: int, work: Callable[[int], None]) -> None:
    """`run` on threads of our own, which sleep when idle: for a process in which torch computes little."""
    _run_on_own_threads(threads, _Parts(work, None))


class _Parts:
    """The parts of one call, and the errors that they raised."""

    def __init__(self, work: Callable[[int], None], counters: npt.NDArray[np.int64] | None) -> None:
        self._work, self._counters = work, counters
        self._errors: list[BaseException] = []

    def run(self, number: int) -> None:
        """Runs one part; raises nothing."""
        try:
            self._work(number)
        except BaseException as error:
            self._errors.append(error)
            if self._counters is not None:
                self._counters += SPOILT

    def end(self) -> None:
        """Raises an error of a part, after all have ended."""
        if self._errors:
            raise self._errors[0]


def _run_on_torchs_threads(library: Any, threads: int, parts: _Parts) -> bool:
    """Runs the parts on torch's threads. Returns False without calling anything if there are too few: inside an operation of torch,
    or under a limit.
    """
    enough: list[bool] = []

    def part(_: int) -> None:
        enough.append(library.omp_get_num_threads() == threads)
        if enough[-1]:
            parts.run(library.omp_get_thread_num())

    library.GOMP_parallel(_Part(part), None, threads, 0)
    parts.end()
    return all(enough)


def _run_on_own_threads(threads: int, parts: _Parts) -> None:
    others = [_own_threads().submit(parts.run, thread) for thread in range(1, threads)]
    parts.run(0)
    wait(others)
    parts.end()


@functools.cache
def _own_threads() -> ThreadPoolExecutor:
    # Never fewer than the parts of a call: the others would wait forever for a part in the queue.
    return ThreadPoolExecutor(max_workers=1 << 16, thread_name_prefix="team")


@functools.cache
def _openmp() -> Any:
    """Returns the library whose threads torch computes with, or None if it is not found."""
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        mapped = {Path(line.split(maxsplit=5)[5]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    except OSError:
        return None
    found = [path for path in mapped if path.name.startswith(_LIBRARIES)]
    inside = Path(torch.__file__).parent.parent
    found.sort(key=lambda path: (inside not in path.parents, path))  # other packages may have loaded a copy of their own
    return ctypes.CDLL(str(found[0])) if found else None
