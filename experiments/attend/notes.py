"""Notes of when functions began and ended, taken without a change of the code that is observed.

Owns: `Notes` and `Span`. Times are of the system's monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from functools import wraps
from time import perf_counter
from typing import Any

Span = tuple[str, float, float]
"""A label, and the begin and the end in seconds."""


class Notes:
    """`spans` in the order of their ends."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._taken: list[tuple[Any, str, Any]] = []

    def take(self, owner: Any, name: str, label: str) -> None:
        """Notes every call of `owner.name` from now on."""
        call = getattr(owner, name)
        self._taken.append((owner, name, call))

        @wraps(call)
        def noted(*arguments: Any, **named: Any) -> Any:
            began_s = perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spans.append((label, began_s, perf_counter()))

        setattr(owner, name, noted)

    def end(self) -> None:
        """Notes no more calls."""
        for owner, name, call in reversed(self._taken):
            setattr(owner, name, call)
        self._taken.clear()

    def of(self, label: str) -> list[tuple[float, float]]:
        """The spans with a label."""
        return [(began_s, ended_s) for name, began_s, ended_s in self.spans if name == label]
