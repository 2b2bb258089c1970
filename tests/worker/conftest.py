"""Fixtures of the worker's tests: one compute thread, and a store in memory for tests that need no node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnstore_worker.testing import MemoryStore


@pytest.fixture(scope="session", autouse=True)
def _one_compute_thread() -> Iterator[None]:
    """On a busy machine, threads that meet at barriers make almost no progress; a single thread is only slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    """A store that works until the test changes it; nothing waits at its gate afterwards."""
    memory = MemoryStore()
    yield memory
    memory.gate.set()
