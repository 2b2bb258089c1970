"""GPUs by name, with the figures that decide between computing and fetching.

Owns: `Gpu` and the table `GPUS`, read from `gpus.toml`, where each figure has its source.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from attnstore.errors import InvalidArgument
from attnstore.secrecy import shown


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: `hbm_gb_per_s` in 10^9 bytes per second, `bf16_tflop_per_s` dense, in 10^12 operations per second."""

    name: str
    hbm_gb_per_s: float
    bf16_tflop_per_s: float
    source: str

    def __post_init__(self) -> None:
        if not (self.hbm_gb_per_s > 0 and self.bf16_tflop_per_s > 0):
            raise InvalidArgument(f"gpu {self.name!r}: bandwidth and throughput must be positive")


GPUS: dict[str, Gpu] = {
    name: Gpu(name, **figures)
    for name, figures in tomllib.loads(files("attnstore.whatif").joinpath("gpus.toml").read_text()).items()
}


def find_gpu(name: str) -> Gpu:
    """Returns the GPU of that name. Raises `InvalidArgument` naming the known ones."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise InvalidArgument(f"gpu {shown(name)} is unknown; known are {', '.join(GPUS)}") from None
