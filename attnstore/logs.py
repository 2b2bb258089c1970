"""Log lines, by way of the standard library's `logging`.

Owns: how a line is made and, in a process of ours, how it is shown. Invariant: nothing is said on standard output, which belongs to
the program that uses us: without a configuration of logging the lines from `warning` up go to standard error.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

_FIELDS = "fields"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The structured logger of the module `name`; whoever handles the logger `name` of `logging` gets its lines."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[structlog.stdlib.filter_by_level, _to_record],
    )
    return logger


def configure_logs(level: str, log_format: str) -> None:
    """Sends every log line of this process to standard error, as text for people (`console`) or one JSON object a line (`json`)."""
    renderers: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter([structlog.processors.TimeStamper(fmt="iso", utc=True), *renderers]))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _to_record(_logger: Any, _method: str, event: EventDict) -> tuple[tuple[str], dict[str, Any]]:
    """What a method of `logging.Logger` takes: a line that any handler can show, and beside it the fields for ours."""
    exc_info = event.pop("exc_info", None)
    text = " ".join([str(event["event"]), *(f"{key}={value!r}" for key, value in event.items() if key != "event")])
    return (text,), {"exc_info": exc_info, "extra": {_FIELDS: event}}


class _Formatter(logging.Formatter):
    """Renders the fields of a record; one of another library has its text only."""

    def __init__(self, processors: list[Processor]) -> None:
        super().__init__()
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        event: Any = {"level": record.levelname.lower(), **getattr(record, _FIELDS, {"event": record.getMessage()})}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for processor in self._processors:
            event = processor(None, record.levelname.lower(), event)
        return str(event)
