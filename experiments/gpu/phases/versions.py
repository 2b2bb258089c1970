"""What the run ran on: the machine, the device and the versions of libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from experiments.gpu.phase import Phase

_PACKAGES = ("torch", "triton", "transformers", "numpy", "grpcio", "protobuf", "numba")


def run(phase: Phase) -> None:
    """Records the facts."""
    phase.rows.fact("device", phase.device.description)
    phase.rows.fact("free_bytes", phase.device.free_bytes())
    phase.rows.fact("cuda", torch.version.cuda)
    phase.rows.fact("python", platform.python_version())
    phase.rows.fact("cores", os.cpu_count())
    for package in _PACKAGES:
        try:
            phase.rows.fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            phase.rows.fact(package, None)
