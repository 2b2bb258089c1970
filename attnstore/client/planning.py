"""Checks the arguments of a client's calls and makes plans of them before anything is sent.

Owns: the valid arguments of a call. Invariant: a call with wrong arguments raises here, and no transport sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.client.base import AttendPlan, MatchPlan, OnLayer, ReadPlan, ViewPlan, WritePlan
from attnstore.client.landing import Landing, readable_view
from attnstore.client.layouts import Layouts
from attnstore.errors import InvalidArgument
from attnstore.limits import CHANNEL_READ_HASHES_MAX, HASHES_MAX, LEASE_MS_MAX
from attnstore.types import Lease
from attnstore.wire import messages
from attnstore.wire.attend import AttendShape
from attnstore.wire.chunks import Buffer


class Planning:
    """The plans of one client. Those of pages raise `NamespaceUnknown` for a namespace that the client did not register.

    `layered_pages_max` is the maximum number of pages of a read with `on_layer`.
    """

    def __init__(self, layouts: Layouts, layered_pages_max: int = CHANNEL_READ_HASHES_MAX) -> None:
        self._layouts = layouts
        self._layered_pages_max = layered_pages_max

    def match(self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], lease_ms: int, deadline_ms: float | None) -> MatchPlan:
        """Returns a plan of `match`. Raises `InvalidArgument`."""
        messages.check_namespace(namespace)
        plan = MatchPlan(namespace, prefixes, checked_lease_ms(lease_ms), self._layouts.deadline(deadline_ms))
        if plan.hashes > HASHES_MAX:
            raise InvalidArgument(f"the prefixes have {plan.hashes} hashes; at most {HASHES_MAX} fit one request")
        return plan

    def read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[bytearray | memoryview],
        layers: tuple[int, int] | None,
        lease: Lease | None,
        on_layer: OnLayer | None,
        deadline_ms: float | None,
    ) -> ReadPlan:
        """Returns a plan of `read`. Raises `InvalidArgument` and `BufferMismatch`."""
        layout = self._layouts.layout(namespace)
        messages.join_hashes(hashes)
        layer_begin, layer_end = layers if layers is not None else (0, layout.layers)
        begin, end = layout.layer_slice(layer_begin, layer_end)
        if on_layer is not None and len(hashes) > self._layered_pages_max:
            raise InvalidArgument(f"a read with on_layer takes at most {self._layered_pages_max} pages, not {len(hashes)}")
        return ReadPlan(
            namespace=namespace,
            hashes=hashes,
            layer_begin=layer_begin,
            layer_end=layer_end or layout.layers,
            layer_bytes=layout.layer_bytes,
            is_whole=end - begin == layout.page_bytes,
            lease_id=lease.lease_id if lease is not None else None,
            landing=Landing(len(hashes), buffers, end - begin),
            deadline=self._layouts.deadline(deadline_ms),
            on_layer=on_layer,
        )

    def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        lease: Lease,
        layers: tuple[int, int] | None,
        deadline_ms: float | None,
    ) -> ViewPlan:
        """Returns a plan of `view`. Raises `InvalidArgument`."""
        layout = self._layouts.layout(namespace)
        messages.join_hashes(hashes)
        begin, end = layout.layer_slice(*(layers if layers is not None else (0, layout.layers)))
        return ViewPlan(namespace, tuple(hashes), begin, end, lease.lease_id, self._layouts.deadline(deadline_ms))

    def write(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[Buffer],
        deadline_ms: float | None,
        sealed: Sequence[int] | None = None,
        ages_ms: Sequence[int] = (),
    ) -> WritePlan:
        """Returns a plan of `write`, or of `hand_over` with `sealed` and `ages_ms`. Raises `InvalidArgument` and
        `BufferMismatch`.
        """
        layout = self._layouts.layout(namespace)
        if len(hashes) != len(pages):
            raise InvalidArgument(f"{len(hashes)} hashes and {len(pages)} pages are given; give one page for each hash")
        messages.join_hashes(hashes)
        views = [readable_view(index, page, layout.page_bytes) for index, page in enumerate(pages)]
        return WritePlan(namespace, hashes, views, self._layouts.deadline(deadline_ms), sealed, ages_ms)

    def attend(self, namespace: bytes, q_heads: int, scale: float, deadline_ms: float | None, value_dim: int = 0) -> AttendPlan:
        """Returns a plan of `attend`. Raises `InvalidArgument`."""
        layout = self._layouts.layout(namespace)
        if value_dim:
            layout.check_latents(value_dim)
        shape = AttendShape(namespace, q_heads, scale, value_dim)
        return AttendPlan(shape, layout, self._layouts.deadline_ms(deadline_ms), self._layouts.clock)


def checked_lease_ms(lease_ms: int) -> int:
    """Returns `lease_ms`. Raises `InvalidArgument` unless it is between 0 and `LEASE_MS_MAX`."""
    if not 0 <= lease_ms <= LEASE_MS_MAX:
        raise InvalidArgument(f"lease_ms is {lease_ms}; it must be between 0 and {LEASE_MS_MAX}")
    return lease_ms
