"""Generates three tokens with Triton's kernels, without numba, and prints them: `python without_numba.py FOLDER`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PACKAGES = ("numba", "llvmlite")
IMPORTED = ("attnstore_worker.cache", "attnstore_worker.device", "attnstore_worker.serve", "attnstore_worker.cli")


def main(folder: Path) -> None:
    """Every import of the packages raises `ImportError`."""
    sys.modules.update(dict.fromkeys(PACKAGES))  # type: ignore[arg-type]
    for module in IMPORTED:
        importlib.import_module(module)
    import torch

    from attnstore.attention import create_attention
    from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
    from attnstore_worker.model import load_model
    from tests.worker.model.devices import TritonDevice

    model = load_model(folder, device=TritonDevice(torch.device("cpu")))
    with Engine(model, EngineOptions(pool_bytes=1 << 20), attention=create_attention("triton")) as engine:
        print(*engine.generate([5, 6, 7], SamplingParams(max_tokens=3)).generated)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
