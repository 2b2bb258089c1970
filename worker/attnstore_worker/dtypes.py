"""The element types a model can run in, as torch names them."""

from __future__ import annotations

from typing import Final

import torch

from attnstore.core.layout import DType

TORCH_DTYPES: Final = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16, DType.FP16: torch.float16}
