"""Paged attention: one contract, three implementations, and the exact merge of partial results.

Owns: the choice of a backend by name. Importing this package loads torch, but neither triton nor numba: the libraries of a backend
are imported when it is created, so a store node without them still starts.
"""

from __future__ import annotations

from attnstore.attention.base import AttentionBackend
from attnstore.attention.checked import CheckedAttention
from attnstore.attention.factory import create_attention
from attnstore.attention.merge import merge
from attnstore.attention.warm_up import warm_up

__all__ = ["AttentionBackend", "CheckedAttention", "create_attention", "merge", "warm_up"]
