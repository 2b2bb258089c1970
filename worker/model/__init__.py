"""Models: transformers' modules and files, with AttnStore's attention inside."""

from __future__ import annotations

from worker.model.loading import LoadedModel, load_model
from worker.model.source import find_model

__all__ = ["LoadedModel", "find_model", "load_model"]
