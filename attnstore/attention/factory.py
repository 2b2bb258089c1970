"""Creates attention backends by name, each with its checking wrapper. The only module that lists them."""

from __future__ import annotations

import importlib
from typing import Final, Literal

from attnstore.attention.base import AttentionBackend
from attnstore.attention.checked import CheckedAttention
from attnstore.errors import InvalidArgument
from attnstore.extras import needs_extra

AttentionName = Literal["cpu", "reference", "triton"]

_BACKENDS: Final[dict[str, tuple[str, str]]] = {
    "cpu": ("attnstore.attention.cpu", "CpuAttention"),
    "reference": ("attnstore.attention.reference", "ReferenceAttention"),
    "triton": ("attnstore.attention.triton", "TritonAttention"),
}


def create_attention(name: AttentionName) -> AttentionBackend:
    """Returns the backend of that name with its checks. Imports the backend's libraries (triton, numba) only now.

    Raises `InvalidArgument` for an unknown name or if the backend's libraries are not installed.
    """
    if name not in _BACKENDS:
        raise InvalidArgument(f"attention backend {name!r} is unknown; known are {', '.join(sorted(_BACKENDS))}")
    module, cls = _BACKENDS[name]
    with needs_extra("attention", f"attention backend {name!r}"):
        backend: AttentionBackend = getattr(importlib.import_module(module), cls)()
    return CheckedAttention(backend)
