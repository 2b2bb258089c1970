"""Log lines with fields, through the standard library's `logging`.

Owns: the structure of a line; `attnstore.server.log_output` formats it for a node. Invariant: nothing is written to standard
output, which belongs to the program that uses the library. Without a configuration of `logging`, lines from `warning` up go to
standard error.
"""

from __future__ import annotations

import logging
from typing import Any, Final

FIELDS: Final = "fields"
"""The attribute of a record that contains the event and its fields."""


class Logger:
    """Logs an event, which is a constant text, with its fields: `log.warning("page refused", node="ada", pages=3)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, **fields: Any) -> None:
        """Logs what an operator may want to know."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Logs a degraded operation."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, exc_info: BaseException | bool = False, **fields: Any) -> None:
        """Logs a failure, with the traceback of `exc_info`, an exception or the current one (True)."""
        self._write(logging.ERROR, event, fields, exc_info)

    def exception(self, event: str, **fields: Any) -> None:
        """Logs a failure with the traceback of the current exception."""
        self._write(logging.ERROR, event, fields, True)

    def _write(self, level: int, event: str, fields: dict[str, Any], exc_info: BaseException | bool = False) -> None:
        if self._logger.isEnabledFor(level):
            text = " ".join([event, *(f"{key}={value!r}" for key, value in fields.items())])
            # The text is passed as an argument, because a `%` in it is not a format.
            self._logger.log(level, "%s", text, exc_info=exc_info, stacklevel=3, extra={FIELDS: {"event": event, **fields}})


def get_logger(name: str) -> Logger:
    """Returns the logger of the module `name`. Its lines go to the handlers of the logger `name` of `logging`."""
    return Logger(name)
