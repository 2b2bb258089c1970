"""What a model asks of a device: which torch device, and whether Triton runs on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TritonDevice:
    """A device with Triton; the processor is one if kernels are interpreted."""

    torch_device: torch.device
    uses_triton: bool = True

    def submitting(self) -> AbstractContextManager[None]:
        """The device and its default stream are current anyway."""
        return nullcontext()
