"""The models that tests run, each loaded once in a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnstore.core.layout import DType
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.testing import write_tiny_model


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    """SmolLM2-135M-Instruct in fp32."""
    return load_model()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random two-layer model of the same kind, a context of 512 and the real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The tiny model in fp32."""
    return load_model(tiny_folder, DType.FP32)
