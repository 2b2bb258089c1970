"""Runs compiled work on the threads that torch computes with.

Owns: `run` and `run_apart`. Why: torch's threads (OpenMP's) spin for milliseconds after each operation, waiting for the next. Other
threads on the same cores would compute beside them at half the speed, and waking those takes longer than telling threads that wait
already. Invariant: all parts run at once, each on a thread of its own, so they may wait for each other (`barrier`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

_LIBRARIES: Final = ("libgomp", "libiomp5", "libomp")
"""OpenMP's libraries by the beginning of their names; all have GNU's entry points."""

_Part = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(threads: int, work: Callable[[int], None]) -> None:
    """Calls `work(0)` to `work(threads - 1)` at once and returns after the last; raises what one of them raised.

    `work` should do little before it gives up the interpreter's lock, for which the others wait, and nothing with torch: its first
    operation on a thread that Python does not know costs 100 us, every time.
    """
    if threads == 1:
        work(0)
    elif (library := _openmp()) is None or not _run_on_torchs_threads(library, threads, work):
        run_apart(threads, work)


def run_apart(threads: int, work: Callable[[int], None]) -> None:
    """`run` on threads of our own, which sleep when they have nothing to do: for a process in which torch computes little."""
    others = [_own_threads().submit(work, thread) for thread in range(1, threads)]
    work(0)
    for other in others:
        other.result()


def _run_on_torchs_threads(library: Any, threads: int, work: Callable[[int], None]) -> bool:
    """False, and nothing was called, where there are not so many: inside an operation of torch, or under a limit."""
    errors: list[BaseException] = []
    enough: list[bool] = []

    def part(_: int) -> None:
        try:
            enough.append(library.omp_get_num_threads() == threads)
            if enough[-1]:
                work(library.omp_get_thread_num())
        except BaseException as error:
            errors.append(error)

    library.GOMP_parallel(_Part(part), None, threads, 0)
    if errors:
        raise errors[0]
    return all(enough)


@functools.cache
def _own_threads() -> ThreadPoolExecutor:
    # Never fewer than are asked for at once: parts that waited in a queue would be waited for.
    return ThreadPoolExecutor(max_workers=1 << 16, thread_name_prefix="team")


@functools.cache
def _openmp() -> Any:
    """The library whose threads torch computes with; None where it is not known."""
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        mapped = {Path(line.split(maxsplit=5)[5]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    except OSError:
        return None
    found = [path for path in mapped if path.name.startswith(_LIBRARIES)]
    inside = Path(torch.__file__).parent.parent
    found.sort(key=lambda path: (inside not in path.parents, path))  # others may have brought one of their own
    return ctypes.CDLL(str(found[0])) if found else None
