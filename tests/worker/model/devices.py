"""A device on which Triton runs, as far as a model uses it."""

from __future__ import annotations

import torch

from attnstore_worker.device.host import HostDevice


class TritonDevice(HostDevice):
    """The processor, if kernels are interpreted, or a torch device whose default stream is used."""

    uses_triton = True

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__()
        self.torch_device = torch_device
