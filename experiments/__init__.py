"""Measurements: users of the public API only; run from a checkout, never shipped.

`python -m experiments.X` without the packages of `attnstore[dev]` says so in one line. Standard library only: peers of some
measurements run in an environment without AttnStore.
"""

from __future__ import annotations

import sys
from types import TracebackType

from attnstore_worker.openmp import spin_briefly


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ends a command with exit status 2 where a package is missing, and as ever otherwise."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        print(f"{error.name} is not installed: make setup, or pip install -e '.[dev]'", file=sys.stderr)
        raise SystemExit(2)
    sys.__excepthook__(kind, error, traceback)


if sys.argv[0] == "-m":  # while Python looks for what `-m` names
    sys.excepthook = _tell
    spin_briefly()
