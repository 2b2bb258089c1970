"""The time that an idle compute thread of torch spins before it sleeps.

Owns: `spin_briefly`. Invariant: only our own programs call it, at their start. An import never does, because the process may be
another program's, for example vLLM's.
"""

from __future__ import annotations

import os


def spin_briefly() -> None:
    """Sets `GOMP_SPINCOUNT` unless it is set. Takes effect if called before torch loads its OpenMP runtime, here and in child
    processes.

    By default an idle thread spins for milliseconds at each barrier. That makes torch ten times slower as soon as another process,
    such as a store node on the same machine, needs a core; 10,000 spins (about 0.1 ms) cost 5-10% on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
