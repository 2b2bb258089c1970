"""Models: transformers' modules and files, with AttnStore's attention inside."""

from __future__ import annotations

from attnstore_worker.model.conversion import export_model
from attnstore_worker.model.loading import LoadedModel, load_model
from attnstore_worker.model_source import find_model

__all__ = ["LoadedModel", "export_model", "find_model", "load_model"]
