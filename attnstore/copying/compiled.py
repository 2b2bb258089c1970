"""Compilation by numba: functions run without the interpreter lock and are cached on disk if there is a writable folder.

Owns: the options of compilation. Exists because numba raises if it finds no folder for its cache, as on a read-only root file
system: a process that compiles at each start is better than one that does not start.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from numba import njit

from attnstore.logs import get_logger

_OPTIONS: Final = {"nogil": True, "error_model": "numpy"}

_log = get_logger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """Decorates a function that is compiled at its first call with arguments of new types."""
    return _kept(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Decorates a function that is inlined into its callers."""
    return _kept(function, forceinline=True)


def compiled_for(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that is compiled at once, for arguments of these types only."""
    return lambda function: _kept(function, signature)


def _kept(function: Callable[..., Any], *signature: Any, **options: bool) -> Any:
    try:
        return njit(*signature, cache=True, **_OPTIONS, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn()
        return njit(*signature, **_OPTIONS, **options)(function)


@lru_cache(maxsize=1)
def _warn() -> None:
    _log.warning("compiled code is not cached, so each start compiles again: set NUMBA_CACHE_DIR to a writable folder")
