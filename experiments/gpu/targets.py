"""The phases with their deadlines, and the ratios that the figures of a run are held against.

Invariant: each ratio compares with something measured in the same run; none is an assertion of a test.
"""

from __future__ import annotations

from typing import Final

from experiments.gpu.results import AT_LEAST, AT_MOST, Target

PHASES: Final = {
    "versions": 20,
    "ceilings": 25,
    "kernels": 90,
    "engine": 120,
    "copies": 50,
    "attention": 80,
    "decode": 100,
    "ttft": 45,
}
"""Seconds of each phase, in the order of a run. Correctness comes first: figures of a wrong path are of no use."""

DEADLINE_S: Final = 540
assert sum(PHASES.values()) <= DEADLINE_S

ATTENTION_DECODE: Final = {
    "llama-3-8b 64 x 8k": Target(AT_LEAST, 0.80),
    "llama-3-8b 1 x 32k": Target(AT_LEAST, 0.65),
    "smollm2 64 x 2k": Target(AT_LEAST, 0.60),
    "llama-3-8b 1 x 128k + 63 x 1k": Target(AT_LEAST, 0.60),
}
ATTENTION_PREFILL: Final = Target(AT_LEAST, 0.5)
PAGE_KERNELS: Final = Target(AT_LEAST, 0.85)
SWAP_IN_LARGE: Final = Target(AT_LEAST, 0.95)
SWAP_IN_SMALL: Final = Target(AT_LEAST, 0.90)
BOTH_WAYS: Final = Target(AT_LEAST, 0.85)
SWAP_IN_FROM_NODE: Final = Target(AT_LEAST, 0.95)
ENGINE_SAVE: Final = Target(AT_MOST, 1.03)
DECODE_BESIDE_SWAP_IN: Final = Target(AT_MOST, 1.05)
DECODE_LARGE_ALONE: Final = Target(AT_LEAST, 0.80)
DECODE_LARGE_BATCH: Final = Target(AT_LEAST, 0.60)
DECODE_SMALL_GRAPHS: Final = Target(AT_LEAST, 8.0)
DECODE_SMALL_MS_MAX: Final = 0.6
PREFILL: Final = Target(AT_LEAST, 0.5)
HOST_OVERHEAD: Final = Target(AT_MOST, 0.10)
TTFT_HOST: Final = Target(AT_MOST, 0.15)
