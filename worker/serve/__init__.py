"""The OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

from worker.serve.app import create_app
from worker.serve.server import Endpoint, serve

__all__ = ["Endpoint", "create_app", "serve"]
