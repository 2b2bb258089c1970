"""The experiments run with the models and the store of the worker's tests."""

from __future__ import annotations

from tests.worker.conftest import _one_compute_thread, model, store, tiny, tiny_folder

__all__ = ["_one_compute_thread", "model", "store", "tiny", "tiny_folder"]
