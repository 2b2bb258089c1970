"""The element types of pages, as torch names them."""

from __future__ import annotations

from typing import Final

import torch

from attnstore.core.layout import DType

TORCH_DTYPES: Final = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16, DType.FP16: torch.float16}
"""Those a model can run in."""


def element_type(dtype: DType) -> torch.dtype:
    """Returns the type of a page's elements: bytes for an opaque page."""
    return TORCH_DTYPES.get(dtype, torch.uint8)
