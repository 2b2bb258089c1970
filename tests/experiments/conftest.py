"""The experiments run with one compute thread and the store of the worker's tests."""

from __future__ import annotations

from tests.worker.conftest import _one_compute_thread, store

__all__ = ["_one_compute_thread", "store"]
