"""How a store node shows its log lines: on standard error, as text for people or as one JSON object a line.

Owns: `configure_logs` and the two forms of a line.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from attnstore.logs import FIELDS

_EVENT_WIDTH = 30
_COLORS = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
_PLAIN = "\x1b[0m"


def configure_logs(level: str, log_format: str) -> None:
    """Sends every log line of this process to standard error. `log_format` is `console` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else _ConsoleLines(colors=sys.stderr.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonLines(logging.Formatter):
    """One JSON object a line: the event, its fields, `level`, `timestamp`, and `exception` with a traceback. A value that JSON
    does not have is shown by its `repr`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {"level": record.levelname.lower(), **_fields(record), "timestamp": _timestamp(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr)


class _ConsoleLines(logging.Formatter):
    """Time, level, event, then the fields by name. A traceback follows on lines of its own."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__()
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        name = record.levelname.lower()
        level = f"[{name:9}]"
        if self._colors and name in _COLORS:
            level = f"{_COLORS[name]}{level}{_PLAIN}"
        event = str(fields.pop("event"))
        shown = " ".join(f"{key}={_shown(value)}" for key, value in sorted(fields.items()))
        line = f"{_timestamp(record)} {level} {event:{_EVENT_WIDTH}} {shown}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the event and its fields. A record of another library has only its text."""
    return dict(getattr(record, FIELDS, None) or {"event": record.getMessage()})


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _shown(value: object) -> str:
    """Returns a text as it is, unless it would break the line; anything else by its `repr`."""
    return value if isinstance(value, str) and value.isprintable() else repr(value)
