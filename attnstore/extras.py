"""Optional dependencies: what is said where one is not installed.

Owns: `needs_extra`. Invariant: whoever asks for something that needs an extra reads, in one line, which package is missing and the
command that installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnstore.errors import InvalidArgument

_OURS = ("attnstore", "attnstore_worker", "experiments")


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """A block that imports packages of `attnstore[extra]`, for the use of `what`. Raises `InvalidArgument` where one is missing or
    does not fit.
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name in _OURS:  # a fault of ours, not of the installation
            raise
        reason = f"package {name}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error).strip()
        raise InvalidArgument(f"{what} needs {reason.splitlines()[0]}: pip install 'attnstore[{extra}]'") from None
