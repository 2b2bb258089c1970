"""The models that tests run, each loaded once in a process.

torch and transformers are imported by the fixtures that need them: pytest loads this file for every test, and in the process that
only hands tests out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from attnstore.core.layout import DType

if TYPE_CHECKING:
    from attnstore_worker.model import LoadedModel


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    """SmolLM2-135M-Instruct in fp32."""
    from attnstore_worker.model import load_model

    return load_model()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random two-layer model of the same kind, a context of 512 and the real tokenizer."""
    from attnstore_worker.testing import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The tiny model in fp32."""
    from attnstore_worker.model import load_model

    return load_model(tiny_folder, DType.FP32)
