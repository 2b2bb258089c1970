"""Opens a device by the name that the option `--device` has, or by its memory.

Owns: `open_device` and `device_of`. Invariants: a device that is returned works, because a page was copied there and back by its
kernels; one that is refused is refused with the true reason, before a model is loaded.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor

from attnstore.core.layout import DType, PageLayout
from attnstore_worker.device.base import Device, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.errors import DeviceUnavailable
from attnstore_worker.options import device_name

_TRIED: Final = PageLayout(layers=1, kv_heads=1, head_dim=16, block_tokens=16, dtype=DType.FP32)

_log = logging.getLogger(__name__)


def open_device(name: str) -> Device:
    """Returns the device of a name of `options.DEVICES`; the caller closes it. `cuda` is `cuda:0`.

    `auto` is `cuda:0` if that works, else the CPU; a log line says why. Raises `DeviceUnavailable`, and `InvalidArgument` for any
    other name.
    """
    kind, _, index = device_name(name).partition(":")
    if kind == "cpu":
        return HostDevice()
    if kind == "simulated":
        from attnstore_worker.device.simulated import SimulatedDevice

        return SimulatedDevice()
    try:
        device = _open_cuda(int(index or 0))
    except DeviceUnavailable as unavailable:
        if kind != "auto":
            raise
        _log.info("the model runs on the CPU: %s", unavailable)
        return HostDevice()
    _log.info("the model runs on %s: %s", device.name, device.description)
    return device


def device_of(memory: Tensor) -> Device:
    """Returns the device of memory that belongs to an engine that runs the model itself; the caller closes it. Its `compute` is the
    stream that is current for the calling thread, which is that of the engine. Raises `DeviceUnavailable`.
    """
    if memory.device.type == "cpu":
        return HostDevice()
    if memory.device.type != "cuda":
        raise DeviceUnavailable(f"blocks lie on {memory.device}, and only those of a CPU and of CUDA devices are copied")
    return _open_cuda(memory.device.index, engine=True)


def _open_cuda(index: int, *, engine: bool = False) -> Device:
    reason = _missing() or _no_driver() or _no_index(index)
    if reason is not None:
        raise DeviceUnavailable(f"cuda:{index} cannot be used: {reason}")
    from attnstore_worker.device.cuda import CudaDevice
    from attnstore_worker.device.cuda_streams import CallersStream, CudaStream

    with ExitStack() as stack:
        try:
            device = CudaDevice(index, CallersStream if engine else CudaStream)
            stack.callback(device.close)
            _try(device)
        except Exception as error:  # whatever the driver, torch or Triton's compiler run into
            raise DeviceUnavailable(f"cuda:{index} does not work ({type(error).__name__}: {_first_line(error)})") from error
        stack.pop_all()
    return device


def _missing() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for the CPU; install one for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "package triton is not installed"
    return None


def _no_driver() -> str | None:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return _first_line(error)
    return None


def _no_index(index: int) -> str | None:
    count = torch.cuda.device_count()
    if index < count:
        return None
    return "there is one device, cuda:0" if count == 1 else f"there are {count} devices, cuda:0 to cuda:{count - 1}"


def _try(device: Device) -> None:
    """Copies a page up and down again: an allocation, registered memory, both copies, their kernels and events."""
    pages = device.host_pages(_TRIED, 2 * _TRIED.page_bytes)
    try:
        there, back = pages.tensor
        there.copy_(torch.arange(there.numel(), dtype=there.dtype).view(there.shape))
        copies = device.copies(device.blocks(_TRIED, 1))
        copies.up(pages.tensor, [0], [0]).wait(Wait.ARRIVED_AFTER_UP)
        copies.down([0], pages.tensor, [1]).wait(Wait.WRITTEN_AFTER_DOWN)
        if not torch.equal(there, back):
            raise DeviceUnavailable("a page that was copied there and back has changed")
    finally:
        device.unregister(pages.tensor)


def _first_line(error: Exception) -> str:
    """Returns the first sentence of the driver's or the compiler's message, which may go on for pages."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
