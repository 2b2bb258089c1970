"""Optional dependencies: the error for a missing one.

Owns: `needs_extra`. Invariant: a feature whose extra is not installed fails with one line that names the missing package and the
command that installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnstore.errors import InvalidArgument

_OURS = ("attnstore", "attnstore_worker", "experiments")


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Runs a block that imports packages of `attnstore[extra]`; `what` names the feature. Raises `InvalidArgument` if a package is
    missing or incompatible.
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name in _OURS:  # a bug of ours, not of the installation
            raise
        reason = f"package {name}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error).strip()
        raise InvalidArgument(f"{what} needs {reason.splitlines()[0]}: pip install 'attnstore[{extra}]'") from None
