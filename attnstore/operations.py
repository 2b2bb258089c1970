"""The operations behind `attnstore status`, `drain`, `undrain`, `evict` and `quota`.

Owns: `ClusterStatus` and its text. Invariants: nothing is changed but the intent for a node and the quota of a tenant; a node that
does not answer within the deadline is shown as such.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from attnstore import aio
from attnstore.clock import Deadline, MonotonicClock
from attnstore.directory import (
    Directory,
    DirectoryUrl,
    Intent,
    Member,
    NodeState,
    is_directory_url,
    load_cluster_key,
    open_directory,
)
from attnstore.directory.trust import MemberCheck
from attnstore.errors import AttnStoreError, InvalidArgument
from attnstore.statistics import NodeStatistics
from attnstore.types import NodeDescription
from attnstore.worker_status import WorkerStatus, worker_rows, worker_statuses

_POLL_S: Final = 0.5
_HOT_LAYOUTS: Final = 8


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach nodes and the directory; `target` as in `attnstore.connect`."""

    target: str = field(repr=False)
    token: str | None = field(repr=False)
    tls_ca: Path | None
    deadline_ms: float
    http_proxy: str | None = None
    cluster_key: Path | None = None

    def node(self, url: str) -> aio.AsyncClient | aio.AsyncClusterClient:
        """Returns a client of one node, or of the nodes of a list."""
        tls_ca = self.tls_ca if url.startswith("grpcs") else None
        return aio.connect(
            url, deadline_ms=self.deadline_ms, token=self.token, tls_ca=tls_ca, transport="grpc", http_proxy=self.http_proxy
        )

    def member(self, member: Member, check: MemberCheck | None) -> aio.AsyncClient:
        """Returns a client of a node, which must pass the check before it receives the token."""
        return aio.connect_member(
            member,
            check,
            token=self.token,
            tls_ca=self.tls_ca,
            deadline_ms=self.deadline_ms,
            transport="grpc",
            http_proxy=self.http_proxy,
        )

    @property
    def is_cluster(self) -> bool:
        """True if the target is a directory, not nodes."""
        return is_directory_url(self.target)

    def directory(self) -> Directory:
        """Returns the cluster's directory. Raises `InvalidArgument` if the target is not a directory."""
        if not self.is_cluster:
            raise InvalidArgument("--directory must be a directory's URL, for example redis://HOST:6379/0")
        key = None if self.cluster_key is None else load_cluster_key(Path(self.cluster_key))
        if self.token is not None and key is None and DirectoryUrl.parse(self.target).key is None:
            raise InvalidArgument(
                "a token is sent to nodes that the directory names: give --cluster-key, or add key=KEY to the directory's URL"
            )
        return open_directory(self.target, key=key, tls_only=self.tls_ca is not None)

    def signing_directory(self) -> Directory:
        """Returns the directory for changes. Raises `InvalidArgument` if the cluster would not believe them."""
        if self.is_cluster and self.cluster_key is None and DirectoryUrl.parse(self.target).key is not None:
            raise InvalidArgument("this cluster believes only what its key has signed: give --cluster-key")
        return self.directory()


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node: its record in the directory, and its own answer, or `error` if it does not answer.

    `hit_rate` is that of `NodeStatistics`, since the node's start; `round_trip_ms` is measured with one call now.
    """

    node_id: str
    url: str
    state: str
    weight: float
    replicas: int
    hot_segments: int
    error: str | None = None
    version: str | None = None
    uptime_ms: int = 0
    round_trip_ms: float | None = None
    capacity_bytes: int = 0
    used_bytes: int = 0
    pages_sealed: int = 0
    leases: int = 0
    in_flight: int = 0
    hit_rate: float | None = None
    evicted_pages: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayoutStatus:
    """A namespace and the number of its pages on the nodes that answer; only those of the asking tenant."""

    namespace: str
    page_bytes: int
    pages_sealed: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All nodes, the largest layouts, and the requested workers. `unix_s` is the time."""

    target: str
    unix_s: float
    nodes: tuple[NodeStatus, ...]
    layouts: tuple[LayoutStatus, ...]
    workers: tuple[WorkerStatus, ...] = ()

    def unanswered(self) -> list[tuple[str, str]]:
        """Returns the nodes and workers that did not answer, by their address, with the reason."""
        told = [(node.url, node.error) for node in self.nodes] + [(worker.url, worker.error) for worker in self.workers]
        return [(url, error) for url, error in told if error is not None]

    def to_json(self) -> dict[str, Any]:
        """Returns the value for `json.dumps`."""
        return asdict(self)


async def cluster_status(access: Access, worker_urls: Sequence[str] = (), worker_token: str | None = None) -> ClusterStatus:
    """Reads the members from the directory and asks every node and the given workers. Raises `Unavailable` if the directory does
    not answer, `InvalidArgument` for a target that is neither a directory nor nodes.
    """
    members = await _members(access)
    nodes = asyncio.gather(*(_node_status(access, member, check) for member, check in members))
    asked = worker_statuses(worker_urls, access.deadline_ms, access.http_proxy, worker_token)
    answers, workers = await asyncio.gather(nodes, asked)
    sealed: Counter[tuple[str, int]] = Counter()
    for _, statistics in answers:
        for space in statistics.namespaces if statistics is not None else ():
            sealed[space.namespace.hex(), space.layout.page_bytes] += space.pages_sealed
    layouts = [LayoutStatus(name, page_bytes, pages) for (name, page_bytes), pages in sealed.most_common(_HOT_LAYOUTS)]
    shown = (DirectoryUrl.parse(access.target).shown if access.is_cluster else access.target).partition("://")[2]
    return ClusterStatus(shown, time.time(), tuple(status for status, _ in answers), tuple(layouts), workers)


async def _members(access: Access) -> list[tuple[Member, MemberCheck | None]]:
    if access.is_cluster:
        directory = access.directory()
        try:
            membership = await directory.membership(None)
        finally:
            await directory.close()
        present = membership.present() if membership is not None else {}
        evicted = [member for member in membership.members if member.node_id not in present] if membership is not None else []
        members = sorted([*present.values(), *evicted], key=lambda member: member.node_id)
        return [(member, directory.check_of(member)) for member in members]
    async with access.node(access.target):  # refuses an invalid target; sends nothing
        scheme, _, addresses = access.target.partition("://")
        return [(Member(address, f"{scheme}://{address}"), None) for address in addresses.partition("?")[0].split(",")]


async def _node_status(access: Access, member: Member, check: MemberCheck | None) -> tuple[NodeStatus, NodeStatistics | None]:
    known = (member.node_id, member.url, member.state.value, member.weight, member.replicas, len(member.hot))
    try:
        async with access.member(member, check) as client:
            await client.describe()  # opens connections
            began = time.perf_counter()
            description = await client.describe()
            round_trip_ms = (time.perf_counter() - began) * 1e3
            statistics = await client.stats()
    except AttnStoreError as error:
        return NodeStatus(*known, error=f"{type(error).__name__}: {error}"), None
    return _answered(known, description, statistics, round_trip_ms), statistics


def _answered(
    known: tuple[str, str, str, float, int, int], description: NodeDescription, statistics: NodeStatistics, round_trip_ms: float
) -> NodeStatus:
    return NodeStatus(
        *known,
        version=description.version,
        uptime_ms=statistics.uptime_ms,
        round_trip_ms=round_trip_ms,
        capacity_bytes=statistics.capacity_bytes,
        used_bytes=statistics.used_bytes,
        pages_sealed=statistics.pages_sealed,
        leases=statistics.leases,
        in_flight=description.in_flight,
        hit_rate=statistics.hit_rate,
        evicted_pages=statistics.evicted_pages,
        read_bytes=statistics.read_bytes,
        written_bytes=statistics.written_bytes,
    )


def status_text(status: ClusterStatus) -> str:
    """Returns a table as text."""
    rows = [("NODE", "STATE", "WEIGHT", "USED", "OF", "PAGES", "HIT RATE", "HOT", "EVICTED", "LEASES", "RTT", "UP", "URL")]
    for node in status.nodes:
        if node.error is not None:
            rows.append((node.node_id, node.state, f"{node.weight:g}", *("-" * 9), f"{node.url}  {node.error}"))
            continue
        rows.append(
            (
                node.node_id,
                node.state,
                f"{node.weight:g}",
                f"{node.used_bytes / max(1, node.capacity_bytes):.0%}",
                _size(node.capacity_bytes),
                str(node.pages_sealed),
                "-" if node.hit_rate is None else f"{node.hit_rate:.1%}",
                str(node.hot_segments),
                str(node.evicted_pages),
                str(node.leases),
                f"{node.round_trip_ms:.1f} ms",
                f"{node.uptime_ms / 1000:.0f} s",
                node.url,
            )
        )
    lines = _aligned(rows)
    if status.layouts:
        layouts = [("NAMESPACE", "PAGE", "PAGES")]
        layouts += [(layout.namespace[:16], _size(layout.page_bytes), str(layout.pages_sealed)) for layout in status.layouts]
        lines += ["", *_aligned(layouts)]
    if status.workers:
        lines += ["", *_aligned(worker_rows(status.workers))]
    return "\n".join(lines)


async def set_intent(access: Access, node_id: str, intent: Intent | None) -> None:
    """Sets the intent for a node. Raises `InvalidArgument` if it is not a member."""
    directory = access.signing_directory()
    try:
        known = await directory.set_intent(node_id, intent)
    finally:
        await directory.close()
    if not known:
        raise InvalidArgument(f"{node_id!r} is no node of this cluster: attnstore status lists them")


async def set_quota(access: Access, tenant: str, quota_bytes: int | None) -> None:
    """Sets or removes a tenant's quota."""
    directory = access.signing_directory()
    try:
        await directory.set_quota(tenant, quota_bytes)
    finally:
        await directory.close()


async def wait_drained(access: Access, node_id: str, timeout_s: float) -> str | None:
    """Waits until the node reports that its pages are handed over. Returns None when it does, otherwise the reason why not."""
    deadline = Deadline(MonotonicClock(), timeout_s * 1e3)
    directory = access.directory()
    try:
        while True:
            membership = await directory.membership(None)
            members = {member.node_id: member for member in membership.members} if membership is not None else {}
            if node_id not in members:
                return f"{node_id} has left, and had not said that its pages are handed over"
            if members[node_id].state is NodeState.DRAINED:
                left = members[node_id].left
                return f"{node_id} is drained, but {left} of its pages found no room at their new owners" if left else None
            if deadline.is_over:
                return f"{node_id} has not handed its pages over within {timeout_s:g} s"
            await asyncio.sleep(_POLL_S)
    finally:
        await directory.close()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(size_bytes: int) -> str:
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes} B"
