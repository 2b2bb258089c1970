"""Fixtures of the worker's tests: the real model, loaded once, and a tiny model of the same kind where the size does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnstore.core.layout import DType
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.testing import MemoryStore, write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_compute_thread() -> Iterator[None]:
    """On a busy machine, threads that meet at barriers make almost no progress; a single thread is only slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    """A store that works until the test changes it; nothing waits at its gate afterwards."""
    memory = MemoryStore()
    yield memory
    memory.gate.set()
