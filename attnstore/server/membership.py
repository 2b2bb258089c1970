"""A node's membership of its cluster: its registration in the directory and the hand-over of its pages.

Owns: the order in which both begin and end. Invariant: a node without `--directory` is no member, and neither of them runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnstore.address import Address
from attnstore.clock import Clock
from attnstore.config import ServeOptions
from attnstore.directory import ClusterView, DirectoryUrl, LayoutRecord, Member, load_cluster_key, open_directory
from attnstore.directory.deletions import DeletionFeed
from attnstore.directory.events import EventFeed
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.peering import Peering
from attnstore.server.handoff import Handoff, OpenPeer
from attnstore.server.registration import Registration
from attnstore.server.slices import finish_among_calls
from attnstore.server.store import Store
from attnstore.telemetry import NodeMetrics


@dataclass(frozen=True, slots=True)
class NodeMembership:
    """`start`, then `stop` once."""

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


def own_record(options: ServeOptions, address: Address, epoch: bytes) -> Member:
    """The record of the node that is bound to `address`. Raises `InvalidArgument` if other nodes could not parse it."""
    advertised = options.advertised(address)
    scheme = "grpcs" if options.tls_cert is not None else "grpc"
    member = Member(
        node_id=options.node_id or str(advertised),
        url=f"{scheme}://{advertised}",
        epoch=epoch,
        weight=options.share,
        replicas=options.replicas,
    )
    try:
        return Member.from_json(member.to_json())
    except ProtocolError as error:
        raise InvalidArgument(f"--node-id, --advertise: {error}") from None


def peering_of(options: ServeOptions, member: Member) -> Peering | None:
    """How a node authenticates the other members; None without `--cluster-key`. Raises `InvalidArgument` for a bad key."""
    if options.cluster_key is None or options.directory is None:
        return None
    cluster = DirectoryUrl.parse(options.directory.get_secret_value()).cluster
    return Peering(load_cluster_key(options.cluster_key), cluster, member, frozenset(options.tenants().values()))


def node_membership(
    options: ServeOptions,
    *,
    member: Member,
    peering: Peering | None,
    store: Store,
    metrics: NodeMetrics,
    clock: Clock,
    feed: EventFeed,
    deletions: DeletionFeed,
    open_peer: OpenPeer,
) -> NodeMembership | None:
    """The membership of the node that is `member`; None without a directory. Raises `InvalidArgument` for bad options."""
    if options.directory is None:
        return None

    async def layouts() -> list[LayoutRecord]:
        held = await finish_among_calls(store.spaces.namespaces())
        return [LayoutRecord(each.space.namespace, each.space.tenant, each.layout.page_bytes) for each in held]

    def follow(view: ClusterView) -> None:
        handoff.follow(view)
        if member.node_id in view.placement.weights:  # a node that owns nothing keeps what it has until it is handed over
            store.spaces.limit_tenants(view.quota_bytes_of(member.node_id))

    handoff = Handoff(member.node_id, store, open_peer, peering, metrics, lambda left: registration.drained(left))
    registration = Registration(
        open_directory(
            options.directory.get_secret_value(),
            key=None if peering is None else peering.key,
            tls_only=options.tls_cert is not None,
        ),
        member,
        clock,
        layouts=layouts,
        hot=store.leases.hot_segments,
        on_view=follow,
        feed=feed,
        deletions=deletions,
        on_deletion=lambda told: store.spaces.deleted_elsewhere(told.space, told.hashes, told.age_ms),
        metrics=metrics,
    )
    return NodeMembership(registration, handoff)
