"""Measurements of AttnStore, run from a checkout. They are not in the wheel.

`python -m experiments.X` without the packages of `attnstore[experiments]` says so in one line. This module needs only the standard
library, because peers of some measurements run in environments of their own.
"""

from __future__ import annotations

import sys
from types import TracebackType

from attnstore_worker.openmp import spin_briefly


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ends the command with exit status 2 if a package is missing. Shows any other exception with its traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        print(f"{error.name} is not installed: make setup, or pip install -e '.[experiments]'", file=sys.stderr)
        raise SystemExit(2)
    sys.__excepthook__(kind, error, traceback)


if sys.argv[0] == "-m":  # while Python looks for what `-m` names
    sys.excepthook = _tell
    spin_briefly()
