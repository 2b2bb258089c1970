"""How long an idle compute thread of torch spins before it sleeps.

Owns: `spin_briefly`. Invariant: only a program of ours calls it, at its start. An import never does: the process may be another's,
for example vLLM's.
"""

from __future__ import annotations

import os


def spin_briefly() -> None:
    """Sets `GOMP_SPINCOUNT` unless it is set. Has an effect before torch loads its OpenMP runtime, here and in child processes.

    By default an idle thread spins for milliseconds at each barrier. That is ten times slower as soon as anything else, such as a
    store node on the same machine, wants a core; 10,000 spins (about 0.1 ms) cost 5-10% on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
