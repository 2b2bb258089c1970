"""Paged attention on the CPU."""

from __future__ import annotations

from attnstore.attention.reference import ReferenceAttention


class CpuAttention(ReferenceAttention):
    """Placeholder that has the right results until the fast kernels land."""
