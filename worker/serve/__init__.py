"""The OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

from worker.serve.app import create_app
from worker.serve.server import serve

__all__ = ["create_app", "serve"]
