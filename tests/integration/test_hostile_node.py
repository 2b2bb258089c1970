"""A broken or hostile node: its client raises a typed error or marks the page, and writes only into the page's buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.client.async_client import AsyncClient
from attnstore.core.hashing import page_checksum
from attnstore.limits import MESSAGE_BYTES_MAX
from attnstore.wire import chunks
from attnstore.wire.messages import METHODS
from attnstore.wire.v1 import store_pb2 as pb
from tests.samples import SMALL, make_batch
from tests.transports import connection_to

SIZE = SMALL.page_bytes
BATCH = make_batch(2, model="hostile")
PAGE = BATCH.pages[0]
SUM = page_checksum(PAGE)


def chunk(
    index: int = 0, *, status: int = 1, size: int = SIZE, offset: int = 0, checksum: int = SUM, payload: bytes = PAGE
) -> bytes:
    return chunks.encode_read_chunk(index, status, size, offset, checksum, payload)  # type: ignore[arg-type]


@asynccontextmanager
async def fake_node(answers: dict[str, list[bytes]]) -> AsyncIterator[str]:
    """A node that answers each RPC with the given bytes, whatever the request. It supports registering a layout."""
    registered = pb.RegisterLayoutResponse(page_bytes=SIZE, pages_max=1).SerializeToString()

    def handler(name: str) -> Any:
        replies = answers.get(name, [registered])

        async def one(_request: Any, _context: Any) -> bytes:
            return replies[0]

        async def one_at_the_end(requests: AsyncIterator[bytes], _context: Any) -> bytes:
            async for _ in requests:  # gRPC may lose an answer that crosses requests
                pass
            return replies[0]

        async def many(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
            for reply in replies:
                yield reply

        if METHODS[name].streams_requests:
            return grpc.stream_unary_rpc_method_handler(one_at_the_end)
        return (
            grpc.unary_stream_rpc_method_handler(many)
            if METHODS[name].streams_responses
            else grpc.unary_unary_rpc_method_handler(one)
        )

    server = grpc.aio.server(options=(("grpc.max_send_message_length", -1),))
    service = METHODS["Read"].path.split("/")[1]
    served = {"RegisterLayout", *answers}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler(name) for name in served}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def client_of(answers: dict[str, list[bytes]]) -> AsyncIterator[attnstore.aio.AsyncClient]:
    async with fake_node(answers) as url, attnstore.aio.connect(url, deadline_ms=5_000, transport="grpc") as client:
        await client.register_layout(BATCH.namespace, SMALL)
        yield client


@pytest.mark.parametrize(
    "replies",
    [
        [b"\xff\xff\xff"],
        [chunk(7)],
        [chunk(2**32 + 5)],
        [chunk(0), chunk(0)],
        [chunk(0, status=2, payload=b"", size=0), chunk(0)],
        [chunk(size=SIZE + 1)],
        [chunk(size=2**63)],
        [chunk(offset=1)],
        [chunk(offset=2**64 - 8)],
        [chunk(payload=PAGE[:100]), chunk(offset=99, payload=PAGE[99:])],
        [chunk(payload=PAGE[:100]), chunk(offset=100, payload=PAGE)],
        [chunk(payload=PAGE + b"x")],
        [chunk(payload=b"")],
        [chunk(status=77)],
        [chunk(status=0)],
        [chunk(status=4, payload=b""), chunk(1)],
        [chunk(status=100, payload=b""), chunk(1)],
        [],
        [chunk(0)],
        [chunk(0), chunk(1, payload=PAGE[:8])],
    ],
    ids=[
        "garbage",
        "unknown page",
        "page beyond 32 bits",
        "page twice",
        "page after its miss",
        "wrong size",
        "huge size",
        "begins late",
        "offset that overflows",
        "overlap",
        "beyond the end",
        "too long",
        "empty chunk",
        "unknown status",
        "no status",
        "status of a write",
        "status of ours",
        "no answer",
        "one page unanswered",
        "page unfinished",
    ],
)
async def test_a_read_that_breaks_the_protocol_raises_and_writes_nowhere_else(replies: list[bytes]) -> None:
    # The two buffers are in one block with guards between them, which would reveal a write outside a page.
    guard = b"\xa5" * 64
    block = bytearray(guard + bytes(SIZE) + guard + bytes(SIZE) + guard)
    first, second = 64, 64 + SIZE + 64
    view = memoryview(block)
    async with client_of({"Read": replies}) as client:
        with pytest.raises(errors.ProtocolError):
            await client.read(BATCH.namespace, BATCH.hashes, [view[first : first + SIZE], view[second : second + SIZE]])
    assert block[:64] == block[64 + SIZE : second] == block[second + SIZE :] == guard
    untouched = bytes(SIZE)
    assert block[second : second + SIZE] in (untouched, PAGE[:8] + untouched[8:])


async def test_a_corrupt_page_is_told_apart_from_intact_ones() -> None:
    twisted = PAGE[:-1] + bytes([PAGE[-1] ^ 1])
    async with client_of({"Read": [chunk(1), chunk(0, payload=twisted)]}) as client:
        answer = await client.read(BATCH.namespace, BATCH.hashes, BATCH.buffers())
    assert answer.statuses == (PageStatus.CORRUPT, PageStatus.OK)
    assert (answer.bytes_read, answer.leading_hits, answer.error) == (SIZE, 0, None)


async def test_a_message_over_the_limit_is_refused() -> None:
    async with client_of({"Read": [bytes(MESSAGE_BYTES_MAX + 1)]}) as client:
        with pytest.raises(errors.InvalidArgument, match="larger than max"):
            await client.read(BATCH.namespace, BATCH.hashes, BATCH.buffers())


Call = Callable[[attnstore.aio.AsyncClient], Any]


@pytest.mark.parametrize(
    ("rpc", "reply", "call"),
    [
        ("Match", pb.MatchResponse(hits=[3]), lambda client: client.match(BATCH.namespace, [BATCH.hashes])),
        ("Match", pb.MatchResponse(hits=[1, 1]), lambda client: client.match(BATCH.namespace, [BATCH.hashes])),
        ("Match", b"\xff", lambda client: client.match(BATCH.namespace, [BATCH.hashes])),
        ("Write", pb.WriteResponse(verdicts=[4]), lambda client: client.write(BATCH.namespace, BATCH.hashes, BATCH.pages)),
        ("Write", pb.WriteResponse(verdicts=[4, 99]), lambda client: client.write(BATCH.namespace, BATCH.hashes, BATCH.pages)),
        ("Write", b"\xff", lambda client: client.write(BATCH.namespace, BATCH.hashes, BATCH.pages)),
        ("Delete", pb.DeleteResponse(statuses=[1]), lambda client: client.delete(BATCH.namespace, BATCH.hashes)),
        ("Delete", pb.DeleteResponse(statuses=[1, 99]), lambda client: client.delete(BATCH.namespace, BATCH.hashes)),
        ("RegisterLayout", pb.RegisterLayoutResponse(page_bytes=1), lambda client: client.register_layout(bytes(32), SMALL)),
        ("Describe", b"\xff", lambda client: client.describe()),
        ("Stats", b"\xff", lambda client: client.stats()),
        ("RenewLease", b"\xff", lambda client: client.renew(attnstore.Lease(bytes(16), 1), 1)),
        ("ReleaseLease", b"\xff", lambda client: client.release(attnstore.Lease(bytes(16), 1))),
        ("Watch", b"\xff", lambda client: client.watch(BATCH.namespace)),
        ("Watch", pb.PageEvent(kind=1), lambda client: client.watch(BATCH.namespace)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_answers_that_no_node_gives_are_protocol_errors(rpc: str, reply: Any, call: Call) -> None:
    encoded = reply if isinstance(reply, bytes) else reply.SerializeToString()
    async with fake_node({rpc: [encoded]}) as url:
        connection = connection_to(url, "grpc")
        connection.layouts.registered(BATCH.namespace, SMALL)
        async with AsyncClient(connection) as client:
            with pytest.raises(errors.ProtocolError):
                await call(client)
