"""The OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

from attnstore_worker.serve.app import create_app
from attnstore_worker.serve.server import Endpoint, serve

__all__ = ["Endpoint", "create_app", "serve"]
