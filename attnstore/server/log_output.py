"""How a store node shows its log lines: on standard error, as text for people or as one JSON object a line.

Owns: `configure_logs`. Exists apart from `attnstore.logs` because only a node needs structlog.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import Processor

from attnstore.logs import FIELDS


def configure_logs(level: str, log_format: str) -> None:
    """Sends every log line of this process to standard error. `log_format` is `console` or `json`."""
    renderers: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter([structlog.processors.TimeStamper(fmt="iso", utc=True), *renderers]))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    """Renders a record's fields. A record of another library has only its text."""

    def __init__(self, processors: list[Processor]) -> None:
        super().__init__()
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        event: Any = {"level": record.levelname.lower(), **getattr(record, FIELDS, {"event": record.getMessage()})}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for processor in self._processors:
            event = processor(None, record.levelname.lower(), event)
        return str(event)
