"""The state of a client between calls: the layouts that it registered, and its default deadline.

Owns: `Layouts`. Invariant: a namespace keeps the layout that a node has accepted for it, so that it can be registered again with a
restarted node.
"""

from __future__ import annotations

from attnstore.client.options import checked_deadline_ms
from attnstore.clock import Clock, Deadline
from attnstore.core.layout import PageLayout
from attnstore.errors import NamespaceUnknown


class Layouts:
    """The namespaces of one client. May be used from several threads."""

    def __init__(self, deadline_ms: float, clock: Clock) -> None:
        self._deadline_ms = deadline_ms
        self.clock = clock
        self._layouts: dict[bytes, PageLayout] = {}

    def registered(self, namespace: bytes, layout: PageLayout) -> None:
        """Called when a node has accepted the namespace."""
        self._layouts[namespace] = layout

    def layout(self, namespace: bytes) -> PageLayout:
        """Returns the layout with which the namespace was registered. Raises `NamespaceUnknown`."""
        try:
            return self._layouts[namespace]
        except KeyError:
            raise NamespaceUnknown("this client did not register the namespace: call register_layout first") from None

    def deadline_ms(self, deadline_ms: float | None) -> float:
        """Returns a call's time: its own, or the client's if that is None. Raises `InvalidArgument`."""
        return self._deadline_ms if deadline_ms is None else checked_deadline_ms(deadline_ms)

    def deadline(self, deadline_ms: float | None) -> Deadline:
        """Returns the deadline of a call that begins now. Raises as `deadline_ms` does."""
        return Deadline(self.clock, self.deadline_ms(deadline_ms))
