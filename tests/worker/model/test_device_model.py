"""The model on a device with Triton: interpreted here, compiled on a GPU if there is one; and without numba.

Each in a process of its own, because Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from attnstore_worker.device.host import HostDevice
from attnstore_worker.errors import OutOfDeviceMemory
from attnstore_worker.model import load_model
from tests.attention.test_triton import run

CHECKS = "tests/worker/model/triton_model_checks.py"


@pytest.mark.slow
def test_the_interpreted_model_agrees_with_the_cpus() -> None:
    done = run(["pytest", "-q", CHECKS], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_compiled_model_agrees_with_the_cpus() -> None:
    done = run(["pytest", "-q", CHECKS])
    assert done.returncode == 0, done.stdout


def test_a_worker_on_a_device_needs_no_numba(tiny_folder: Path) -> None:
    done = run(["tests.worker.model.without_numba", str(tiny_folder)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


class SmallDevice(HostDevice):
    """A device whose memory does not suffice for a step, as torch notices it."""

    @contextmanager
    def submitting(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error)) from error


def test_a_model_too_large_for_its_device_is_no_unsupported_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(OutOfDeviceMemory, match="2 GiB"):
        load_model(tiny_folder, device=SmallDevice())
