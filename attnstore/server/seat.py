"""A node's seat in its cluster: its registration in the directory and the hand-over of its pages, wired together.

Owns: the order in which both begin and end. Invariant: a node without `--directory` has no seat, and nothing of this runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnstore.address import Address
from attnstore.clock import Clock
from attnstore.config import ServeOptions
from attnstore.directory import ClusterView, LayoutRecord, Member, open_directory
from attnstore.directory.events import EventFeed
from attnstore.server.handoff import Handoff, OpenPeer
from attnstore.server.registration import Registration
from attnstore.server.slices import finish_among_calls
from attnstore.server.store import Store
from attnstore.telemetry import NodeMetrics


@dataclass(frozen=True, slots=True)
class Seat:
    """See the module. `start`, then `stop` once."""

    registration: Registration
    handoff: Handoff

    def start(self) -> None:
        """Joins the cluster."""
        self.handoff.start()
        self.registration.start()

    async def stop(self) -> None:
        """Leaves the cluster."""
        try:
            await self.handoff.stop()
        finally:
            await self.registration.stop()


def take_seat(
    options: ServeOptions,
    *,
    node_id: str,
    epoch: bytes,
    address: Address,
    store: Store,
    metrics: NodeMetrics,
    clock: Clock,
    feed: EventFeed,
    open_peer: OpenPeer,
) -> Seat | None:
    """The seat of the node that is bound to `address`; None where it is on its own. Raises `InvalidArgument` for bad options."""
    if options.directory is None:
        return None

    async def layouts() -> list[LayoutRecord]:
        held = await finish_among_calls(store.namespaces())
        return [LayoutRecord(each.space.namespace, each.space.tenant, each.layout.page_bytes) for each in held]

    def follow(view: ClusterView) -> None:
        handoff.follow(view)
        if node_id in view.placement.weights:  # a node that owns nothing keeps what it has until it is handed over
            store.limit_tenants(view.quota_bytes_of(node_id))

    scheme = "grpcs" if options.tls_cert is not None else "grpc"
    url = f"{scheme}://{options.advertised(address)}"
    member = Member(node_id=node_id, url=url, epoch=epoch, weight=options.weight, replicas=options.replicas)
    tokens = {tenant: token for token, tenant in options.tenants().items()}
    handoff = Handoff(node_id, store, open_peer, tokens, metrics, lambda: registration.drained())
    registration = Registration(
        open_directory(options.directory.get_secret_value()),
        member,
        clock,
        layouts=layouts,
        hot=store.hot_segments,
        on_view=follow,
        feed=feed,
        metrics=metrics,
    )
    return Seat(registration, handoff)
