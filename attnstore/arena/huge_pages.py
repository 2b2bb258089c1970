"""Huge pages for extents that come into use, made on a thread beside everything else.

Owns: the thread, from the first extent to `close`. Nobody waits for it: a huge page takes some milliseconds to make, most of them
the system's work of moving what is there.
"""

from __future__ import annotations

import queue
import threading

from attnstore import memory_files
from attnstore.memory_files import HUGE_PAGE_BYTES

_PAUSE_S = 0.2
"""Between two huge pages: without it a node that fills new extents took four fifths of a 10 Gb/s link, on two cores."""


class HugePages:
    """`make` from any thread, then `close` once."""

    def __init__(self) -> None:
        self._extents = queue.SimpleQueue[memoryview | None]()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def make(self, extent: memoryview) -> None:
        """Some time soon; as far as this system can."""
        self._extents.put(extent[:])  # a view of our own, which keeps the memory mapped
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="attnstore-huge-pages", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Returns once no extent is touched any more."""
        with self._lock:
            self._closed.set()
            thread = self._thread
        self._extents.put(None)
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        works = True
        while (extent := self._extents.get()) is not None:
            with extent:
                for at in range(0, len(extent) if works else 0, HUGE_PAGE_BYTES):
                    if self._closed.wait(_PAUSE_S):
                        return
                    with extent[at : at + HUGE_PAGE_BYTES] as piece:
                        works = len(piece) < HUGE_PAGE_BYTES or memory_files.collapse(piece)
                    if not works:
                        break
