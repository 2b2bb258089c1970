"""The shm transport: pages read from the node's memory, mapped into this process, and written through memory lent to the node.

Owns: the mapped extents, and the connections over which pages are located.
Invariant: a page is OK only if its stamp was unchanged after its last byte was used, and its bytes had the checksum with which it
was sealed. A recycled slot, an extent that went to another tenant and a node that is gone are misses.

The node's memory is mapped read-only. A written page is copied twice, by the writer into lent memory and by the node into its slot,
in parallel for different pages, and never passes a socket.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from attnstore.client.base import AttendPlan, BulkUnavailable, MatchPlan, OpenChannel, ReadPlan, ViewPlan, WritePlan
from attnstore.client.calls import Call, Runner, ThreadCall
from attnstore.client.transports.channel_pool import ChannelPool
from attnstore.client.transports.lent import LentMemory
from attnstore.client.transports.mapped import Located, MappedExtent, PageViews
from attnstore.client.transports.parts import PartWorkers, joined, nothing
from attnstore.clock import Deadline
from attnstore.core.hashing import range_checksum
from attnstore.errors import AttnStoreError, InvalidArgument, Overloaded, ProtocolError
from attnstore.fences import read_fence
from attnstore.limits import SHM_LOCATE_HASHES_MAX
from attnstore.streams.shm import Message, ShmStream
from attnstore.types import PageStatus, WriteResult
from attnstore.wire import shm
from attnstore.wire.shm import ALL_LAYERS, ANSWERS, ExtentLayout, Item, Kind, Place, Welcome

_CONNECT_MS_MAX = 2_000
_COPIED_HASHES = 64
"""Few enough that a page without a lease is copied soon after it was located, enough that locating costs little compared with
copying.
"""
_QUESTIONS_IN_FLIGHT = 2
_VIEWED_HASHES = SHM_LOCATE_HASHES_MAX


class ShmTransport:
    """A `Transport` to a node on this host that runs as the same user; the only one with `view`.

    `channels` is how many threads may copy the pages of one large read; `offer` is the name under which the node offers its memory,
    `shared_path` its arena where that is no sealed memory.
    """

    name = "shm"

    def __init__(self, open_channel: OpenChannel, channels: int, offer: str = "shm", shared_path: Path | None = None) -> None:
        self._open_channel = open_channel
        self._offer = offer
        self._shared_path = shared_path
        self._pool = ChannelPool(self._connect)
        self._parts = PartWorkers(channels, "attnstore-shm")
        self._lock = threading.Lock()
        self._epoch = b""
        self._extents: dict[int, _Known] = {}

    @staticmethod
    def is_reachable(address: str) -> bool:
        """Returns whether `address`, from `Describe`, names a socket that this process sees: the node is on this host."""
        return os.path.exists(address)

    def close(self) -> None:
        """Breaks running transfers and unmaps the memory; views that are held stay readable."""
        try:
            self._pool.close()
        finally:
            self._parts.close()
            with self._lock:
                self._extents.clear()

    def read(self, plan: ReadPlan) -> Call[None]:
        """See `Transport.read`. `on_layer` is called when all layers have come."""
        plan.landing.begin(self.name)
        pages = self._parts.call(len(plan.hashes), plan.transfer, functools.partial(self._reading, plan), nothing)

        def told() -> None:
            pages.wait()
            plan.tell_all_layers()

        return pages if plan.on_layer is None else ThreadCall(told, plan.transfer)

    def write(self, plan: WritePlan) -> Call[WriteResult] | None:
        """See `Transport.write`. None for pages that a node hands over: the protocol has no place for their age."""
        if plan.ages_ms:
            return None
        verdicts = self._parts.call(len(plan.hashes), plan.transfer, functools.partial(self._writing, plan), joined)
        return ThreadCall(lambda: plan.result(verdicts.wait()), plan.transfer)

    def match(self, _plan: MatchPlan) -> None:
        """Not over shm: which pages the node has is asked over another transport."""

    def attend(self, _plan: AttendPlan, _run: Runner) -> None:
        """Not over shm: whoever maps the pages attends to them in place."""

    def view(self, plan: ViewPlan) -> Call[PageViews]:
        """The pages where they lie; see `PageViews`. Errors as in `Transport`."""

        def viewed() -> PageViews:
            return PageViews(self._pool.exchange(plan.deadline, plan.transfer, view), plan.begin, plan.end)

        def view(channel: _Channel) -> list[Located]:
            question = _Question(plan.namespace, plan.lease_id, plan.hashes, ALL_LAYERS, plan.end, _VIEWED_HASHES)
            pages: list[Located] = []
            for located in self._located(channel, question):
                if not isinstance(located, PageStatus):
                    place, extent = located
                    status = extent.status_of(place, plan.deadline)
                    if status is not PageStatus.OK:
                        located = status
                pages.append(located)
            return pages

        return ThreadCall(viewed, plan.transfer)

    def _reading(self, plan: ReadPlan, first: int, last: int) -> Callable[[], None]:
        begin, end = plan.layer_begin * plan.layer_bytes, plan.layer_end * plan.layer_bytes
        layers = ALL_LAYERS if plan.is_whole else (plan.layer_begin, plan.layer_end)

        def read(channel: _Channel) -> None:
            question = _Question(plan.namespace, plan.lease_id, plan.hashes[first:last], layers, end, _COPIED_HASHES)
            for index, located in enumerate(self._located(channel, question), first):
                plan.deadline.left_ms()
                channel.answered = True
                _land(plan, index, located, begin)

        return functools.partial(self._pool.exchange, plan.deadline, plan.transfer, read)

    def _writing(self, plan: WritePlan, begin: int, end: int) -> Callable[[], tuple[PageStatus, ...]]:
        def write(channel: _Channel) -> tuple[PageStatus, ...]:
            lent = channel.lend(len(plan.pages[begin]))
            verdicts: list[PageStatus] = []
            indices = iter(range(begin, end))
            for count in lent.groups(end - begin):
                while lent.free < count:
                    verdicts += channel.verdicts()
                channel.offer(plan.namespace, [_lend(plan, lent, index) for index in islice(indices, count)])
            while len(verdicts) < end - begin:
                verdicts += channel.verdicts()
            return tuple(verdicts)

        return functools.partial(self._pool.exchange, plan.deadline, plan.transfer, write)

    def _located(self, channel: _Channel, question: _Question) -> Iterator[Located]:
        """Yields the pages in the requested order. While the caller uses some, the node locates the next: two requests are in
        flight while there are pages to locate.
        """
        parts = question.parts()
        left = len(question.hashes)
        while left:
            for part in islice(parts, _QUESTIONS_IN_FLIGHT - channel.questions):
                channel.locate(question, part)
            places = channel.places()
            left -= len(places)
            epoch, end, extents = channel.welcome.epoch, question.end, self._extents
            for place in places:
                if isinstance(place, PageStatus):
                    yield place
                    continue
                if end > place.size_bytes:
                    raise ProtocolError(f"the node holds {place.size_bytes} bytes of a page of which {end} were asked for")
                known = extents.get(place.extent)
                if known is not None and known.tenancy == place.tenancy and known.epoch == epoch:
                    yield place, known.extent
                else:
                    yield self._mapped(channel, place)

    def _mapped(self, channel: _Channel, place: Place) -> Located:
        extent = channel.map(place)
        if extent is None or not extent.holds(place):
            # Emptied meanwhile. Its mapping is not kept, because touching it would fill the emptied file with zeros again.
            return PageStatus.MISSING
        with self._lock:
            self._extents[place.extent] = _Known(channel.welcome.epoch, place.tenancy, extent)
        return place, extent

    def _connect(self, deadline: Deadline) -> _Channel:
        try:
            address, token = self._open_channel(self._offer, deadline)
        except (InvalidArgument, Overloaded) as error:
            # The node was restarted without this transport, or has no free tokens now.
            raise BulkUnavailable(f"the node opens no shared memory: {error}") from None
        soon = deadline.sooner(_CONNECT_MS_MAX)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(soon.left_ms() / 1000)
            connection.connect(address)
            channel = _Channel.opened(ShmStream(connection), token, soon, self._shared_path)
        except OSError as error:
            connection.close()
            raise BulkUnavailable(f"the node's shared memory cannot be reached from here: {error}") from None
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._epoch != channel.welcome.epoch:
                self._extents.clear()  # of a node that was restarted: its memory is not this one's
                self._epoch = channel.welcome.epoch
        return channel


class _Question(NamedTuple):
    """The pages to locate; `layers` of them are needed, bytes up to `end`. Requested in parts of `part_hashes`."""

    namespace: bytes
    lease_id: bytes | None
    hashes: Sequence[bytes]
    layers: tuple[int, int]
    end: int
    part_hashes: int

    def parts(self) -> Iterator[Sequence[bytes]]:
        """Yields the hashes in order, in parts."""
        for at in range(0, len(self.hashes), self.part_hashes):
            yield self.hashes[at : at + self.part_hashes]


class _Known(NamedTuple):
    """A mapped extent and the epoch of its node's memory."""

    epoch: bytes
    tenancy: int
    extent: MappedExtent


def _lend(plan: WritePlan, lent: LentMemory, index: int) -> Item:
    """Puts one page where the node finds it."""
    checksum, offset_bytes = lent.put(plan.pages[index])
    return Item(plan.hashes[index], checksum if plan.sealed is None else plan.sealed[index], offset_bytes)


def _land(plan: ReadPlan, index: int, located: Located, begin: int) -> None:
    """Copies one page into its buffer."""
    if isinstance(located, PageStatus):
        plan.landing.miss(index, located)
        return
    place, extent = located
    stamps, stamp, at = extent.stamps, place.stamp, extent.stamp_index(place)
    if stamps[at] != stamp:
        plan.landing.miss(index, PageStatus.MISSING)
        return
    landing = plan.landing.whole(index)
    whole, layers = extent.copy(place.offset_bytes + begin, landing, len(landing) if plan.is_whole else plan.layer_bytes)
    # Checked after the copy: whatever the node did while we copied, it changed the stamp first.
    read_fence()
    if stamps[at] != stamp:
        plan.landing.miss(index, PageStatus.MISSING)
    else:
        plan.landing.settle(index, (whole if plan.is_whole else range_checksum(layers)) == place.checksum)


class _Channel:
    """One open connection: a client's half of the protocol."""

    def __init__(self, stream: ShmStream, welcome: Welcome, shared_path: Path | None) -> None:
        self.welcome = welcome
        self._shared_path = shared_path
        self.answered = False
        self._stream = stream
        self._layout = ExtentLayout(welcome.extent_bytes)
        self._asked: deque[int] = deque()  # pages of each unanswered LOCATE in flight
        self._early: deque[list[Place | PageStatus]] = deque()  # answers that came before a MAP's
        self._lent: LentMemory | None = None
        self._offered: deque[int] = deque()  # pages of each TAKE in flight

    @classmethod
    def opened(cls, stream: ShmStream, token: bytes, deadline: Deadline, shared_path: Path | None) -> _Channel:
        """Sends HELLO and waits for WELCOME. Raises `BulkUnavailable`."""
        stream.bound(deadline.left_ms)
        try:
            stream.send(shm.encode_hello(token))
            answer = _answer(stream, Kind.HELLO)
            return cls(stream, shm.decode_welcome(answer.payload), shared_path)
        except AttnStoreError as error:
            raise BulkUnavailable(f"shared memory was not opened: {error}") from None

    def begin(self, deadline: Deadline) -> None:
        """Starts an exchange."""
        self.answered = False
        self._stream.bound(deadline.left_ms)

    @property
    def questions(self) -> int:
        """The number of LOCATEs in flight."""
        return len(self._asked)

    def locate(self, question: _Question, hashes: Sequence[bytes]) -> None:
        """Requests a part of the pages; `places` returns the answers in order."""
        assert len(hashes) <= SHM_LOCATE_HASHES_MAX
        self._stream.send(shm.encode_locate(question.namespace, question.lease_id, hashes, question.layers))
        self._asked.append(len(hashes))

    def places(self) -> list[Place | PageStatus]:
        """Returns the next places, at least one."""
        return self._early.popleft() if self._early else self._take_places()

    def map(self, place: Place) -> MappedExtent | None:
        """Returns the extent of a place; None if it now has another tenant."""
        while self._asked:
            self._early.append(self._take_places())
        self._stream.send(shm.encode_map(place.extent, place.tenancy))
        answer = _answer(self._stream, Kind.MAP)
        if answer.kind is Kind.GONE:
            return None
        assert answer.descriptor is not None
        try:
            span = shm.decode_mapped(answer.payload, self._layout)
            return MappedExtent(answer.descriptor, self._layout, *span, self._shared_path)
        finally:
            os.close(answer.descriptor)

    def lend(self, page_bytes: int) -> LentMemory:
        """Returns lent memory for pages of that size. Raises `BulkUnavailable` if there is none."""
        if self._lent is None or self._lent.page_bytes != page_bytes:
            try:
                lent = LentMemory(page_bytes)
            except OSError as error:
                raise BulkUnavailable(f"no memory to write through: {error.strerror}") from None
            try:
                self._stream.send_with_descriptor(shm.encode_lend(lent.size_bytes), lent.file)
            finally:
                lent.close_file()
            try:
                _answer(self._stream, Kind.LEND)
            except Overloaded as error:
                raise BulkUnavailable(f"the node takes no memory to write through: {error}") from None
            self._lent = lent
        return self._lent

    def offer(self, namespace: bytes, items: Sequence[Item]) -> None:
        """Offers pages that were put into lent memory; `verdicts` returns the answers in order."""
        self._stream.send(shm.encode_take(namespace, items))
        self._offered.append(len(items))

    def verdicts(self) -> list[PageStatus]:
        """Returns the answer to the oldest `offer`."""
        assert self._lent is not None
        offered = self._offered.popleft()
        try:
            answer = _answer(self._stream, Kind.TAKE)
        except ProtocolError:
            raise
        except AttnStoreError:
            self._await_refusals()
            raise
        self.answered = True
        if answer.count != offered:
            raise ProtocolError(f"the node gave {answer.count} verdicts on {offered} pages")
        self._lent.give_back(offered)
        return shm.decode_taken(answer.payload)

    def _await_refusals(self) -> None:
        """Waits until a refused call has also ended at the node: a repeated call must not meet its pages."""
        with suppress(AttnStoreError):
            for _ in self._offered:
                self._stream.receive(ANSWERS[Kind.TAKE])

    def shutdown(self) -> None:
        self._stream.shutdown()

    def close(self) -> None:
        self._stream.close()

    def _take_places(self) -> list[Place | PageStatus]:
        answer = _answer(self._stream, Kind.LOCATE)
        asked = self._asked.popleft()
        if not 0 < answer.count <= asked:
            raise ProtocolError(f"the node placed {answer.count} pages of {asked}")
        if answer.count < asked:
            self._asked.appendleft(asked - answer.count)
        return shm.decode_located(answer.payload, self._layout)


def _answer(stream: ShmStream, request: Kind) -> Message:
    """Returns the answer to a request. Raises the error with which the node refused it."""
    answer = stream.receive(ANSWERS[request])
    if answer.kind is Kind.REFUSED:
        raise shm.decode_refusal(answer.payload)
    return answer
