"""Fixtures of the worker's tests: one compute thread, a store in memory for tests that need no node, and simulated devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.engine import Engine
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


@pytest.fixture(params=["cpu", "early", "late"])
def each_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test on the processor, and on the simulated device with both schedules: each of its engines has a device of its own.
    None of their accesses may race, even if an engine went on.
    """
    if request.param == "cpu":
        yield
        return
    schedule: Schedule = request.param
    devices: list[SimulatedDevice] = []
    on_processor = Engine.__init__

    def on_device(engine: Engine, *arguments: Any, **named: Any) -> None:
        devices.append(SimulatedDevice(schedule))
        on_processor(engine, *arguments, device=devices[-1], **named)

    monkeypatch.setattr(Engine, "__init__", on_device)
    yield
    for device in devices:
        device.close()
        assert device.races.found == []
