"""The grpc transport: pages as chunks of gRPC streams. It carries every call.

Owns: the conversion of plans into requests of the service. Its calls run on the event loop of the channel, so a thread that waits
for one pays for one hop to that loop.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from attnstore.client.base import AttendPlan, AttendStream, MatchPlan, ReadPlan, WritePlan
from attnstore.client.calls import Call, LoopCall, Runner, in_thread
from attnstore.client.transports.attend import AttendCall, BlockingAttend
from attnstore.client.transports.rpc import RpcChannel
from attnstore.errors import Unavailable
from attnstore.limits import CHUNK_BYTES_MAX
from attnstore.types import MatchResult, WriteResult
from attnstore.wire import messages
from attnstore.wire.chunks import decode_read_chunk, encode_write_chunk


class GrpcTransport:
    """A `Transport` over the channel of the client's control calls; the owner of the channel closes it."""

    name = "grpc"

    def __init__(self, channel: RpcChannel) -> None:
        self.channel = channel
        self._loop = channel.loop

    def read(self, plan: ReadPlan) -> Call[None]:
        """See `Transport.read`. `on_layer` is called when all layers have arrived."""
        return LoopCall(self._loop, functools.partial(self._read, plan))

    def write(self, plan: WritePlan) -> Call[WriteResult]:
        """See `Transport.write`."""
        return LoopCall(self._loop, functools.partial(self._write, plan))

    def match(self, plan: MatchPlan) -> Call[MatchResult]:
        """See `Transport.match`."""
        return LoopCall(self._loop, functools.partial(self._match, plan))

    def attend(self, plan: AttendPlan, run: Runner) -> Call[AttendStream]:
        """See `Transport.attend`."""
        return LoopCall(self._loop, functools.partial(self._attend, plan, run))

    async def attend_call(self, plan: AttendPlan) -> AttendCall:
        """Returns an attend stream for tasks of the event loop."""
        return AttendCall(await self.channel.attend(plan.deadline_ms), plan.shape, plan.deadline_ms)

    async def _read(self, plan: ReadPlan) -> None:
        landing = plan.landing
        landing.begin(self.name)
        request = messages.ReadRequest(
            namespace=plan.namespace,
            hashes=messages.join_hashes(plan.hashes),
            layer_begin=plan.layer_begin,
            layer_end=plan.layer_end,
            lease_id=plan.lease_id or b"",
        )
        await self.channel.read(request, lambda chunk: landing.take(decode_read_chunk(chunk)), plan.deadline.left_ms())
        landing.require_complete()
        if plan.on_layer is not None:
            # Not on the event loop, because a callback may block, or call this client.
            await in_thread(plan.tell_all_layers, plan.transfer)

    async def _write(self, plan: WritePlan) -> WriteResult:
        try:
            response = await self.channel.write(_chunks_of(plan), plan.deadline.left_ms())
        except Unavailable:
            # gRPC loses a refusal that crosses pages in flight; an empty request in the same namespace is refused for the same
            # reason.
            await self.channel.call("Match", messages.MatchRequest(namespace=plan.namespace), plan.deadline.left_ms())
            raise
        return plan.result(messages.statuses_from_wire(response.verdicts, len(plan.hashes)))

    async def _match(self, plan: MatchPlan) -> MatchResult:
        request = messages.MatchRequest(
            namespace=plan.namespace,
            prefixes=[messages.join_hashes(prefix) for prefix in plan.prefixes],
            lease_ms=plan.lease_ms,
        )
        answer = await self.channel.call("Match", request, plan.deadline.left_ms())
        return plan.result(answer.hits, answer.lease_id, answer.lease_ms)

    async def _attend(self, plan: AttendPlan, run: Runner) -> AttendStream:
        return BlockingAttend(await self.attend_call(plan), run)


def _chunks_of(plan: WritePlan) -> Iterator[bytes]:
    namespace = plan.namespace
    for index, (page_hash, page) in enumerate(zip(plan.hashes, plan.pages, strict=True)):
        checksum, age_ms = plan.checksum(index), plan.age_ms(index)
        for offset in range(0, len(page), CHUNK_BYTES_MAX):
            payload = page[offset : offset + CHUNK_BYTES_MAX]
            yield encode_write_chunk(namespace, page_hash, checksum, offset, payload, age_ms)
            namespace = page_hash = b""
