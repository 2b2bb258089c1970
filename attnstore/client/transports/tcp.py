"""The tcp transport: pages over the page channel, directly into the caller's buffers.

Owns: the client's half of the page channel.
Invariant: when a call ends, however it ends, each of its connections has completed its exchange or is closed, so no late byte can
land in a buffer that its owner uses again.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from struct import unpack

from attnstore.address import Address
from attnstore.client.base import AttendPlan, AttendStream, BulkUnavailable, MatchPlan, OpenChannel, ReadPlan, WritePlan
from attnstore.client.calls import Call, Runner, ThreadCall
from attnstore.client.landing import Landing
from attnstore.client.transports.attend import ChannelAttend
from attnstore.client.transports.channel_pool import ChannelPool
from attnstore.client.transports.parts import PartWorkers, joined, nothing
from attnstore.clock import Deadline
from attnstore.core.hashing import LAYER_CHECKSUM_BYTES, page_checksum
from attnstore.errors import AttnStoreError, InvalidArgument, Overloaded, ProtocolError
from attnstore.limits import (
    CHANNEL_CREDITS,
    CHANNEL_GATHER_PAGES,
    CHANNEL_MATCH_HASHES_MAX,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_SECOND_READ_HASHES_MAX,
)
from attnstore.streams.frames import FrameStream
from attnstore.types import MatchResult, PageStatus, WriteResult
from attnstore.wire.frame_receiver import Role
from attnstore.wire.match import decode_hits, encode_prefixes
from attnstore.wire.page_channel import NO_LEASE, VERSION, Frame, Kind, Order, decode_refusal, encode_frame, next_request

_CONNECT_MS_MAX = 2_000
_READS_IN_FLIGHT_MAX = 2


class TcpTransport:
    """`host` is where the node answers gRPC; `channels` is the maximum number of connections for one large transfer."""

    name = "tcp"

    def __init__(self, host: str, open_channel: OpenChannel, channels: int) -> None:
        self._host = host
        self._open_channel = open_channel
        self._pool = ChannelPool(self._connect)
        self._attending = weakref.WeakSet[ChannelAttend]()
        self._parts = PartWorkers(channels, "attnstore-tcp")
        self._match_hashes_max = CHANNEL_READ_HASHES_MAX  # until the node has told

    def close(self) -> None:
        """Breaks running transfers and closes everything, without waiting: running calls end soon, with `ClientClosed`."""
        with ExitStack() as closing:
            for stream in list(self._attending):
                closing.callback(stream.close)
            closing.callback(self._parts.close)
            closing.callback(self._pool.close)

    def read(self, plan: ReadPlan) -> Call[None]:
        """See `Transport.read`. `on_layer` makes the node send layer by layer, over one connection."""
        plan.landing.begin(self.name)
        part = functools.partial(self._reading, plan)
        if plan.on_layer is not None:
            return ThreadCall(part(0, len(plan.hashes)), plan.transfer)
        return self._parts.call(len(plan.hashes), plan.transfer, part, nothing)

    def write(self, plan: WritePlan) -> Call[WriteResult]:
        """See `Transport.write`."""
        verdicts = self._parts.call(len(plan.hashes), plan.transfer, functools.partial(self._writing, plan), joined)
        return ThreadCall(lambda: plan.result(verdicts.wait()), plan.transfer)

    def match(self, plan: MatchPlan) -> Call[MatchResult] | None:
        """See `Transport.match`. None for more than one frame carries, and for much before the node has told how much it takes."""
        if max(plan.hashes, len(plan.prefixes)) > self._match_hashes_max:
            return None
        run = functools.partial(_Channel.match, plan=plan, payload=encode_prefixes(plan.prefixes))
        return ThreadCall(functools.partial(self._pool.exchange, plan.deadline, plan.transfer, run), plan.transfer)

    def attend(self, plan: AttendPlan, _run: Runner) -> Call[AttendStream]:
        """See `Transport.attend`. The stream has a connection of its own."""
        return ThreadCall(functools.partial(self._attend, plan), plan.transfer)

    def _reading(self, plan: ReadPlan, begin: int, end: int) -> Callable[[], None]:
        # No function of this class runs between the pool and the channel, because it would cost one more call per read.
        run = functools.partial(_Channel.read, plan=plan, begin=begin, end=end)
        return functools.partial(self._pool.exchange, plan.deadline, plan.transfer, run)

    def _writing(self, plan: WritePlan, begin: int, end: int) -> Callable[[], tuple[PageStatus, ...]]:
        run = functools.partial(_Channel.write, plan=plan, begin=begin, end=end)
        return functools.partial(self._pool.exchange, plan.deadline, plan.transfer, run)

    def _attend(self, plan: AttendPlan) -> ChannelAttend:
        channel = self._connect(Deadline(plan.clock, plan.deadline_ms))
        stream = ChannelAttend(channel.stream, plan.shape, plan.clock, plan.deadline_ms)
        self._attending.add(stream)
        return stream

    def _connect(self, deadline: Deadline) -> _Channel:
        try:
            address, token = self._open_channel(self.name, deadline)
        except (InvalidArgument, Overloaded) as error:
            # The node was restarted without this transport, or has no free tokens now.
            raise BulkUnavailable(f"the node opens no page channel: {error}") from None
        soon = deadline.sooner(_CONNECT_MS_MAX)
        try:
            # `:port` is a port of the host on which the node was reached.
            offered = Address.of(self._host, int(address[1:])) if address.startswith(":") else Address.parse(address)
            connection = offered.connect(soon.left_ms() / 1000)
        except (OSError, ValueError) as error:
            raise BulkUnavailable(f"the page channel at {self._host} cannot be reached: {error}") from None
        try:
            channel = _Channel.opened(FrameStream(connection, Role.CLIENT), token, soon)
            self._match_hashes_max = channel.match_hashes_max
            return channel
        except BaseException as error:
            connection.close()
            if isinstance(error, (AttnStoreError, OSError)):
                raise BulkUnavailable(f"the page channel was not opened: {error}") from None
            raise


class _Channel:
    """One open connection: a client's half of the protocol."""

    def __init__(self, stream: FrameStream, read_hashes_max: int, match_hashes_max: int, credits_max: int) -> None:
        self.stream = stream
        self.answered = False
        self._read_hashes_max = read_hashes_max
        self.match_hashes_max = match_hashes_max
        self._credits_max = credits_max
        self._request = 0

    @classmethod
    def opened(cls, stream: FrameStream, token: bytes, deadline: Deadline) -> _Channel:
        """Sends HELLO and waits for WELCOME."""
        stream.bound(deadline.left_ms)
        stream.send(encode_frame(Frame(Kind.HELLO, page=VERSION, size_bytes=len(token))), token)
        welcome = stream.receive()
        channel = cls(
            stream,
            min(welcome.page, CHANNEL_READ_HASHES_MAX),
            # A node that does not tell takes as many as in a READ.
            min(welcome.offset_bytes or welcome.page, CHANNEL_MATCH_HASHES_MAX),
            min(welcome.request, CHANNEL_CREDITS),
        )
        if welcome.kind is Kind.REFUSED:
            raise channel._refusal(welcome)
        if welcome.page < 1 or welcome.request < 1:
            raise ProtocolError("the node's WELCOME allows nothing")
        return channel

    def begin(self, deadline: Deadline) -> None:
        """Sets how long the next exchange may last."""
        self.answered = False
        self.stream.bound(deadline.left_ms)

    def shutdown(self) -> None:
        self.stream.shutdown()

    def close(self) -> None:
        # Reset, not closed: otherwise a node that still sends would wait for our window, with the pages pinned, until it considers
        # us stalled.
        self.stream.abort()

    def read(self, plan: ReadPlan, begin: int, end: int) -> None:
        """Reads pages `[begin, end)` of the plan, as READs of bounded size with two in flight."""
        stream, landing, by_page = self.stream, plan.landing, plan.on_layer is None
        hashes_max = self._hashes_max(plan, end - begin)
        pending: deque[_PendingRead] = deque()
        at = begin
        while at < end or pending:
            while at < end and len(pending) < _READS_IN_FLIGHT_MAX:
                count = min(hashes_max, end - at)
                pending.append(self._ask(plan, at, count))
                at += count
            read = pending[0]
            frame = self._checked(stream.receive(), Kind.SLICE, read.request)
            if frame.status is not PageStatus.OK:
                self._take_miss(plan, read, frame)
            elif by_page:
                index = read.index_of(frame)
                page = _place(landing, index, frame)
                read.answered += 1
                stream.receive(page, ahead=len(pending) > 1 or not read.is_complete)
                landing.settle(index, plan.is_intact(page, frame.checksum))
            else:
                self._take_layer(plan, read, frame)
            if read.is_complete:
                pending.popleft()

    def write(self, plan: WritePlan, begin: int, end: int) -> tuple[PageStatus, ...]:
        """Writes pages `[begin, end)` of the plan, with at most the node's credits in flight."""
        self._request = next_request(self._request)
        verdicts: list[PageStatus] = []
        for index in range(begin, end):
            if index - begin - len(verdicts) == self._credits_max:
                verdicts.append(self._take_verdict(begin + len(verdicts), index))
            page = plan.pages[index]
            frame = Frame(
                Kind.WRITE,
                request=self._request,
                page=index,
                size_bytes=len(page),
                offset_bytes=plan.age_ms(index),
                checksum=plan.checksum(index),
                namespace=plan.namespace,
                hash=plan.hashes[index],
            )
            self.stream.send(encode_frame(frame), page)
        while len(verdicts) < end - begin:
            verdicts.append(self._take_verdict(begin + len(verdicts), end))
        return tuple(verdicts)

    def match(self, plan: MatchPlan, payload: bytes) -> MatchResult:
        """Sends one MATCH and returns its answer."""
        if max(plan.hashes, len(plan.prefixes)) > self.match_hashes_max:
            raise BulkUnavailable(f"the node takes at most {self.match_hashes_max} hashes in a MATCH since it was restarted")
        self._request = next_request(self._request)
        question = Frame(
            Kind.MATCH,
            request=self._request,
            page=len(plan.prefixes),
            size_bytes=len(payload),
            offset_bytes=plan.lease_ms,
            namespace=plan.namespace,
        )
        self.stream.send(encode_frame(question), payload)
        answer = self._receive(Kind.MATCHED, self._request)
        return plan.result(decode_hits(self.stream.whole_payload(answer)), answer.lease_id, answer.offset_bytes)

    def _hashes_max(self, plan: ReadPlan, pages: int) -> int:
        """Returns how many pages one READ requests."""
        if plan.on_layer is None:
            return min(self._read_hashes_max, CHANNEL_SECOND_READ_HASHES_MAX)
        if pages > self._read_hashes_max:
            raise InvalidArgument(f"the node takes at most {self._read_hashes_max} pages in a read with on_layer, not {pages}")
        return pages

    def _ask(self, plan: ReadPlan, begin: int, count: int) -> _PendingRead:
        self._request = next_request(self._request)
        joined = b"".join(plan.hashes[begin : begin + count])
        frame = Frame(
            Kind.READ,
            request=self._request,
            size_bytes=len(joined),
            order=Order.PAGES if plan.on_layer is None else Order.LAYERS,
            layer_begin=plan.layer_begin,
            layer_end=plan.layer_end,
            namespace=plan.namespace,
            lease=plan.lease_id or NO_LEASE,
        )
        self.stream.send(encode_frame(frame), joined)
        return _PendingRead(self._request, begin, count)

    def _take_miss(self, plan: ReadPlan, read: _PendingRead, frame: Frame) -> None:
        assert frame.status is not None
        if read.has_layers:
            raise ProtocolError("a page is missing after layers of the others have come")
        index = read.index_of(frame)
        plan.landing.miss(index, frame.status)
        read.answered += 1
        read.missing.add(index)
        if read.is_complete:
            plan.tell_all_layers()

    def _take_layer(self, plan: ReadPlan, read: _PendingRead, frame: Frame) -> None:
        """Receives one layer of some pages, those after the previous ones."""
        found = read.found()
        count, rest_bytes = divmod(frame.size_bytes, LAYER_CHECKSUM_BYTES + plan.layer_bytes)
        pages = found[read.position : read.position + count]
        as_announced = bool(pages) and pages[0] == read.index_of(frame) and len(pages) == count and not rest_bytes
        if not as_announced or count > CHANNEL_GATHER_PAGES:
            raise ProtocolError("a SLICE of a read by layers does not begin or end where the last one says")
        # The remaining bytes of a corrupt page still arrive, and are discarded.
        views = [
            plan.landing.window(page, frame.offset_bytes, plan.layer_bytes) or memoryview(bytearray(plan.layer_bytes))
            for page in pages
        ]
        sealed = bytearray(LAYER_CHECKSUM_BYTES * count)
        self.stream.receive(memoryview(sealed), *views)
        for page, view, checksum in zip(pages, views, unpack(f"<{count}Q", sealed), strict=True):
            intact = page_checksum(view) == checksum
            if plan.landing.landed(page, plan.layer_bytes) or not intact:
                plan.landing.judge(page, intact)
        read.position += count
        if read.position == len(found):
            read.position = 0
            layer = plan.layer_begin + frame.offset_bytes // plan.layer_bytes
            if layer + 1 == plan.layer_end:
                read.answered = read.count
            assert plan.on_layer is not None
            plan.on_layer(layer, plan.landing.leading_open)

    def _take_verdict(self, index: int, sent_to: int) -> PageStatus:
        """Receives the verdict on page `index`; pages up to `sent_to` were sent."""
        try:
            frame = self._receive(Kind.VERDICT, self._request)
        except ProtocolError:
            raise
        except AttnStoreError:
            self._await_refusals(sent_to - index - 1)
            raise
        if frame.page != index:
            raise ProtocolError(f"the node's verdict is on page {frame.page} where page {index} was next")
        assert frame.status is not None
        return frame.status

    def _await_refusals(self, pages: int) -> None:
        """Waits until a refused call has also ended at the node: a repeated call must not meet its pages."""
        with suppress(AttnStoreError):
            for _ in range(pages):
                self.stream.whole_payload(self.stream.receive())

    def _receive(self, expected: Kind, request: int) -> Frame:
        return self._checked(self.stream.receive(), expected, request)

    def _checked(self, frame: Frame, expected: Kind, request: int) -> Frame:
        """Returns the frame if it is the expected one. Raises the refusal that arrived instead, or `ProtocolError`."""
        self.answered = True
        if frame.kind is Kind.REFUSED:
            raise self._refusal(frame)
        if frame.kind is not expected or frame.request != request:
            raise ProtocolError(
                f"a {frame.kind.name} frame of request {frame.request} came where {expected.name} of {request} was due"
            )
        return frame

    def _refusal(self, frame: Frame) -> AttnStoreError:
        return decode_refusal(self.stream.whole_payload(frame))


def _place(landing: Landing, index: int, frame: Frame) -> memoryview:
    """Returns where the page of a frame goes. Raises `ProtocolError` for a page that does not arrive whole."""
    page = landing.whole(index)
    if frame.offset_bytes or frame.size_bytes != len(page):
        raise ProtocolError(f"page {index} came in part: {frame.size_bytes} bytes at {frame.offset_bytes} of {len(page)}")
    return page


class _PendingRead:
    """One READ in flight: pages `[begin, begin + count)` of the plan."""

    __slots__ = ("_found", "answered", "begin", "count", "missing", "position", "request")

    def __init__(self, request: int, begin: int, count: int) -> None:
        self.request = request
        self.begin = begin
        self.count = count
        self.answered = 0
        self.missing: set[int] = set()
        self.position = 0  # in a read by layers: how many of the found pages have their slice of the current layer
        self._found: list[int] = []

    @property
    def is_complete(self) -> bool:
        """True if every page has its answer."""
        return self.answered == self.count

    @property
    def has_layers(self) -> bool:
        """In a read by layers: no page can be missing any more."""
        return bool(self._found)

    def index_of(self, frame: Frame) -> int:
        """Returns the plan's index of the frame's page. Raises `ProtocolError` for a page that was not requested."""
        if frame.page >= self.count:
            raise ProtocolError(f"the node answered page {frame.page} of a READ of {self.count}")
        return self.begin + frame.page

    def found(self) -> list[int]:
        """In a read by layers: the pages that are not missing, known once the first slice with bytes has arrived."""
        if not self._found:
            self._found = [index for index in range(self.begin, self.begin + self.count) if index not in self.missing]
        return self._found
