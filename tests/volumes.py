"""Named volumes of the compose file, as an earlier start would have left them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attnstore_worker.file_digests import cache_dir
from attnstore_worker.model import load_model

_USER = 10001


def seed_models(volume: Path) -> None:
    """Puts the converted model and the compiled functions into the workers' volume.

    On two cores it takes 20 s to convert the model, and each worker takes 16 s to compile its functions.
    """
    if not (cache_dir() / "models").exists():
        load_model()
    shutil.copytree(cache_dir() / "models", volume / "models")
    compiled = Path(os.environ["NUMBA_CACHE_DIR"])
    if compiled.exists():
        shutil.copytree(compiled, volume / "numba")
    for path in (volume, *volume.rglob("*")):
        os.chown(path, _USER, _USER)
