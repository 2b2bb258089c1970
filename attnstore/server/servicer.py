"""The service: each RPC as a short coroutine over the store.

Owns: only the translation between messages and the store. All state changes happen in `Store`.
Invariant: a page stays pinned while its bytes are copied out; a prepared slot is completed or aborted however a call ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import grpc

from attnstore.directory.deletions import DeletionFeed
from attnstore.errors import InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import CHANNEL_TOKEN_MS_MAX, CHUNK_BYTES_MAX, HASHES_MAX, LEASE_MS_MAX, PAGE_BYTES_MAX, WORK_PAGES_MAX
from attnstore.server.attend import LIMITS, Attending
from attnstore.server.attend_rpc import attend
from attnstore.server.events import EventHub
from attnstore.server.ingest import Ingest
from attnstore.server.rpc import Handler
from attnstore.server.scrubber import Scrubber
from attnstore.server.slices import finish_among_calls, in_slices
from attnstore.server.stall import Stall
from attnstore.server.store import Store
from attnstore.statistics import NamespaceStatistics, NodeStatistics
from attnstore.telemetry import NodeMetrics
from attnstore.types import PageStatus, Space
from attnstore.wire import chunks, messages

_STATUSES_AT_ONCE: Final = 32 * WORK_PAGES_MAX
"""Counting a message costs far less than the work on a page."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """The identity of the node. `epoch` is 16 random bytes, created at start."""

    node_id: str
    epoch: bytes
    version: str


@dataclass(frozen=True, slots=True)
class ChannelOffer:
    """A bulk transport of this node: its address, and the function that issues one-time tokens for a tenant."""

    address: str
    issue_token: Callable[[str], bytes]


class Servicer:
    """The handlers by RPC name, for `RpcShell`."""

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        store: Store,
        scrubber: Scrubber,
        hub: EventHub,
        metrics: NodeMetrics,
        stall_ms: int,
        streams_in_flight: Callable[[], int],
        channels: Mapping[str, ChannelOffer],
        attending: Attending | None,
        deletions: DeletionFeed | None,
    ) -> None:
        self._identity = identity
        self._store = store
        self._deletions = deletions
        self._scrubber = scrubber
        self._hub = hub
        self._metrics = metrics
        self._stall_s = stall_ms / 1000
        self._streams_in_flight = streams_in_flight
        self._channels = channels
        self._attending = attending
        self._draining = False
        self._started_ms = store.now_ms()

    def handlers(self) -> dict[str, Handler]:
        """Returns one coroutine function for each RPC of the service."""
        return {
            "Describe": self.describe,
            "RegisterLayout": self.register_layout,
            "Match": self.match,
            "Read": self.read,
            "Write": self.write,
            "RenewLease": self.renew_lease,
            "ReleaseLease": self.release_lease,
            "Delete": self.delete,
            "Verify": self.verify,
            "OpenChannel": self.open_channel,
            "Stats": self.stats,
            "Watch": self.watch,
            "Attend": self.attend,
        }

    def drain(self) -> None:
        """Lets `Describe` report draining and ends the subscriptions of watchers; running reads and writes continue."""
        self._draining = True
        self._hub.close()

    async def describe(self, _request: Any, _context: Any, tenant: str) -> messages.DescribeResponse:
        now = self._store.statistics()
        return messages.DescribeResponse(
            node_id=self._identity.node_id,
            epoch=self._identity.epoch,
            version=self._identity.version,
            limits=messages.Limits(
                chunk_bytes_max=CHUNK_BYTES_MAX,
                hashes_max=HASHES_MAX,
                lease_ms_max=LEASE_MS_MAX,
                page_bytes_max=min(PAGE_BYTES_MAX, self._store.page_bytes_max),
            ),
            capacity_bytes=now.capacity_bytes,
            used_bytes=now.used_bytes,
            in_flight=self._streams_in_flight(),
            draining=self._draining,
            transports=[
                messages.Transport(name="grpc"),
                *(messages.Transport(name=name, address=offer.address) for name, offer in self._channels.items()),
            ],
            attend=None if self._attending is None else messages.AttendOffer(**asdict(LIMITS)),
            tenant=tenant,
        )

    async def register_layout(self, request: Any, _context: Any, tenant: str) -> messages.RegisterLayoutResponse:
        layout = messages.layout_from_wire(request.layout)
        pages_max = self._store.spaces.register(_space(tenant, request.namespace), layout)
        return messages.RegisterLayoutResponse(page_bytes=layout.page_bytes, pages_max=pages_max, epoch=self._identity.epoch)

    async def match(self, request: Any, _context: Any, tenant: str) -> messages.MatchResponse:
        space = _space(tenant, request.namespace)
        if len(request.prefixes) > HASHES_MAX:
            raise InvalidArgument(f"the request has {len(request.prefixes)} prefixes; at most {HASHES_MAX} are allowed")
        prefixes: list[list[bytes]] = []
        for joined in in_slices(request.prefixes, WORK_PAGES_MAX):
            prefixes += map(messages.split_hashes, joined)
            if len(prefixes) < len(request.prefixes):
                await asyncio.sleep(0)
        if sum(map(len, prefixes)) > HASHES_MAX:
            raise InvalidArgument(f"the request has {sum(map(len, prefixes))} hashes; at most {HASHES_MAX} fit one request")
        found = await finish_among_calls(self._store.leases.matching(space, prefixes, request.lease_ms))
        self._metrics.matched(found.hits, prefixes)
        return messages.MatchResponse(hits=found.hits, lease_id=found.lease_id or b"", lease_ms=found.lease_ms)

    async def read(self, request: Any, context: Any, tenant: str) -> None:
        space = _space(tenant, request.namespace)
        layout = self._store.layout_of(space)
        begin, end = layout.layer_slice(request.layer_begin, request.layer_end)
        lease_id = request.lease_id or None
        async with Stall(self._stall_s) as stall:
            for index, page_hash in enumerate(messages.split_hashes(request.hashes)):
                page = self._store.pin(space, page_hash, lease_id)
                try:
                    found = page if isinstance(page, PageStatus) else self._store.hashed_slice(page, begin, end)
                    if isinstance(found, PageStatus):
                        self._metrics.pages("Read", found)
                        message = chunks.encode_read_chunk(index, found)
                        await context.write(message)
                        stall.moved(len(message))
                        continue
                    data, checksum = found
                    for offset in range(0, len(data), CHUNK_BYTES_MAX):
                        payload = data[offset : offset + CHUNK_BYTES_MAX]
                        await context.write(chunks.encode_read_chunk(index, PageStatus.OK, len(data), offset, checksum, payload))
                        stall.moved(len(payload))
                finally:
                    if not isinstance(page, PageStatus):
                        self._store.unpin(page)
                self._metrics.sent("grpc", 1, len(data))

    async def write(self, _request: None, context: Any, tenant: str) -> messages.WriteResponse:
        ingest: Ingest | None = None
        try:
            async with Stall(self._stall_s) as stall:
                while (message := await context.read()) is not grpc.aio.EOF:
                    stall.moved(len(message))
                    chunk = chunks.decode_write_chunk(message)
                    ingest = ingest or Ingest(self._store, _space(tenant, chunk.namespace))
                    await self._take(ingest, chunk)
                    # The next message then reuses this memory, which is still in the cache.
                    del message, chunk
            verdicts = ingest.finish() if ingest is not None else ()
        finally:
            if ingest is not None:
                ingest.close()
        await self._count("Write", verdicts)
        return messages.WriteResponse(verdicts=messages.statuses_to_wire(verdicts))

    async def _count(self, rpc: str, statuses: Sequence[PageStatus]) -> None:
        for part in in_slices(statuses, _STATUSES_AT_ONCE):
            for status, pages in Counter(part).items():
                self._metrics.pages(rpc, status, pages)
            await asyncio.sleep(0)

    async def _take(self, ingest: Ingest, chunk: chunks.WriteChunk) -> None:
        if len(chunk.payload) > CHUNK_BYTES_MAX:
            raise InvalidArgument(f"a chunk carries {len(chunk.payload)} bytes; the maximum is {CHUNK_BYTES_MAX}")
        if chunk.namespace not in (b"", ingest.space.namespace):
            raise ProtocolError("one write stream serves one namespace; open another for the next")
        if chunk.page_hash:
            while not ingest.begin(chunk.page_hash, chunk.checksum, chunk.age_ms):
                await asyncio.sleep(0)
        ingest.receive(chunk.offset_bytes, chunk.payload)
        self._metrics.received("grpc", len(chunk.payload))

    async def renew_lease(self, request: Any, _context: Any, tenant: str) -> messages.RenewLeaseResponse:
        return messages.RenewLeaseResponse(lease_ms=self._store.leases.renew(tenant, request.lease_id, request.lease_ms))

    async def release_lease(self, request: Any, _context: Any, tenant: str) -> messages.ReleaseLeaseResponse:
        released = await finish_among_calls(self._store.leases.releasing(tenant, request.lease_id))
        return messages.ReleaseLeaseResponse(released=released)

    async def delete(self, request: Any, _context: Any, tenant: str) -> messages.DeleteResponse:
        space = _space(tenant, request.namespace)
        self._store.layout_of(space)
        hashes = messages.split_hashes(request.hashes)
        await asyncio.sleep(0)
        statuses = await finish_among_calls(self._store.spaces.deleting(space, hashes))
        await self._count("Delete", statuses)
        if request.tell and self._deletions is not None:
            gone = zip(hashes, statuses, strict=True)
            self._deletions.offer(space, [page_hash for page_hash, status in gone if status is not PageStatus.PINNED])
        return messages.DeleteResponse(statuses=messages.statuses_to_wire(statuses))

    async def verify(self, request: Any, _context: Any, tenant: str) -> messages.VerifyResponse:
        statuses = await self._scrubber.verify(_space(tenant, request.namespace), messages.split_hashes(request.hashes))
        return messages.VerifyResponse(statuses=messages.statuses_to_wire(statuses))

    async def open_channel(self, request: Any, _context: Any, tenant: str) -> messages.OpenChannelResponse:
        offer = self._channels.get(request.transport)
        if offer is None:
            offered = ", ".join(self._channels) or "none"
            # A prefix of the name is enough: formatting a name of four megabytes takes 40 ms.
            raise InvalidArgument(f"this node offers no bulk transport {request.transport[:16]!r}; it offers: {offered}")
        if self._draining:
            raise Unavailable("the node is draining")
        return messages.OpenChannelResponse(address=offer.address, token=offer.issue_token(tenant), token_ms=CHANNEL_TOKEN_MS_MAX)

    async def stats(self, _request: Any, _context: Any, tenant: str) -> messages.StatsResponse:
        now = self._store.statistics()
        message = messages.statistics_to_wire(
            NodeStatistics(
                node_id=self._identity.node_id,
                epoch=self._identity.epoch,
                capacity_bytes=now.capacity_bytes,
                used_bytes=now.used_bytes,
                pages_sealed=now.pages_sealed,
                pages_arriving=now.pages_arriving,
                pages_pinned=now.pages_pinned,
                leases=now.leases,
                hit_pages=now.hit_pages,
                missed_pages=now.missed_pages,
                stored_pages=now.stored_pages,
                evicted_pages=now.evicted_pages,
                verified_pages=now.verified_pages,
                corrupt_pages=now.corrupt_pages,
                read_pages=self._metrics.read_pages,
                read_bytes=self._metrics.read_bytes,
                written_bytes=now.stored_bytes,
                uptime_ms=int(self._store.now_ms() - self._started_ms),
                namespaces=(),
            )
        )
        for part in in_slices(await finish_among_calls(self._store.spaces.namespaces(tenant)), WORK_PAGES_MAX):
            messages.add_namespaces(
                message, [NamespaceStatistics(held.space.namespace, held.layout, held.pages_sealed) for held in part]
            )
            await asyncio.sleep(0)
        return message

    async def watch(self, request: Any, context: Any, tenant: str) -> None:
        space = _space(tenant, request.namespace)
        self._store.layout_of(space)
        with self._hub.subscribed(space) as subscription:
            await context.send_initial_metadata((messages.WATCHING,))
            while True:
                for event in await subscription.take():
                    async with asyncio.timeout(self._stall_s):
                        await context.write(messages.event_to_wire(event))

    async def attend(self, _request: None, context: Any, tenant: str) -> None:
        await attend(self._attending, self._metrics, context, tenant, self._stall_s)


def _space(tenant: str, namespace: bytes) -> Space:
    return Space(tenant, messages.check_namespace(namespace))
