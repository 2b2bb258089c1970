"""Named volumes of the compose file, as an earlier start would have left them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attnstore_worker.model import load_model
from attnstore_worker.model.conversion import cache_dir

_USER = 10001


def seed_models(volume: Path) -> None:
    """Puts the converted model into the workers' volume: converting takes 20 s on two cores."""
    load_model()
    shutil.copytree(cache_dir() / "models", volume / "models")
    for path in (volume, *volume.rglob("*")):
        os.chown(path, _USER, _USER)
