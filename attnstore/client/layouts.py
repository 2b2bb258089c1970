"""What a client keeps between calls: the layouts that it registered, and its default deadline.

Owns: `Layouts`. Invariant: a namespace keeps the layout that a node has accepted for it, so that it can be registered again with a
node that was restarted.
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
        """Is called when a node knows the namespace."""
        self._layouts[namespace] = layout

    def layout(self, namespace: bytes) -> PageLayout:
        """The layout that the namespace was registered with. Raises `NamespaceUnknown`."""
        try:
            return self._layouts[namespace]
        except KeyError:
            raise NamespaceUnknown("this client did not register the namespace: call register_layout first") from None

    def deadline_ms(self, deadline_ms: float | None) -> float:
        """A call's time: its own, or the client's where that is None. Raises `InvalidArgument`."""
        return self._deadline_ms if deadline_ms is None else checked_deadline_ms(deadline_ms)

    def deadline(self, deadline_ms: float | None) -> Deadline:
        """The deadline of a call that begins now. Raises as `deadline_ms`."""
        return Deadline(self.clock, self.deadline_ms(deadline_ms))
