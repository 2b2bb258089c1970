"""The reference worker: an inference engine whose KV pages may live in an AttnStore node.

Data flows one way: `cli -> engine -> (model, cache) -> attnstore`. Only `worker.cache` talks to a store.
"""

from __future__ import annotations

import os

# Must be set before torch loads its OpenMP runtime. By default an idle compute thread spins for milliseconds at each barrier. That
# is ten times slower as soon as anything else, such as a store node on the same machine, wants a core; 10,000 spins (about 0.1 ms)
# cost 5-10% on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
