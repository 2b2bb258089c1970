"""The description and statistics of a cluster, computed from those of its nodes.

Invariant: sums are over the given nodes only; the epoch of a cluster changes whenever a node is restarted, joins or leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from attnstore.limits import EPOCH_BYTES
from attnstore.statistics import NamespaceStatistics, NodeStatistics
from attnstore.types import NodeDescription


def joint_description(answers: Sequence[NodeDescription]) -> NodeDescription:
    """Merges descriptions: capacities are sums, limits are the lowest of any, transports are those that all offer."""
    return NodeDescription(
        node_id=_cluster_id(answers),
        epoch=_joint_epoch([answer.epoch for answer in answers]),
        version=min(answer.version for answer in answers),
        capacity_bytes=sum(answer.capacity_bytes for answer in answers),
        used_bytes=sum(answer.used_bytes for answer in answers),
        in_flight=sum(answer.in_flight for answer in answers),
        draining=all(answer.draining for answer in answers),
        transports=dict.fromkeys(sorted(set.intersection(*(set(answer.transports) for answer in answers))), ""),
        hashes_max=min(answer.hashes_max for answer in answers),
        lease_ms_max=min(answer.lease_ms_max for answer in answers),
        page_bytes_max=min(answer.page_bytes_max for answer in answers),
        tenant=answers[0].tenant,
    )


def joint_statistics(answers: Sequence[NodeStatistics]) -> NodeStatistics:
    """Sums statistics over nodes; a namespace is listed once."""
    spaces: dict[bytes, NamespaceStatistics] = {}
    for answer in answers:
        for space in answer.namespaces:
            known = spaces.get(space.namespace)
            sealed = space.pages_sealed + (known.pages_sealed if known else 0)
            spaces[space.namespace] = NamespaceStatistics(space.namespace, space.layout, sealed)
    totals = {
        name: sum(getattr(answer, name) for answer in answers)
        for name in NodeStatistics.__slots__
        if name not in ("node_id", "epoch", "uptime_ms", "namespaces")
    }
    return NodeStatistics(
        node_id=_cluster_id(answers),
        epoch=_joint_epoch([answer.epoch for answer in answers]),
        uptime_ms=min(answer.uptime_ms for answer in answers),
        namespaces=tuple(spaces.values()),
        **totals,
    )


def _cluster_id(answers: Sequence[NodeDescription] | Sequence[NodeStatistics]) -> str:
    return ",".join(sorted(answer.node_id for answer in answers))


def _joint_epoch(epochs: Sequence[bytes]) -> bytes:
    """Changes whenever a node is restarted, joins or leaves."""
    return hashlib.blake2b(b"".join(sorted(epochs)), digest_size=EPOCH_BYTES).digest()
