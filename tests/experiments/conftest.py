"""The experiments run with the models of the worker's tests."""

from __future__ import annotations

from tests.worker.conftest import _one_compute_thread, model, tiny, tiny_folder

__all__ = ["_one_compute_thread", "model", "tiny", "tiny_folder"]
