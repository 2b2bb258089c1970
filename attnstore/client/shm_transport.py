"""The shm transport: pages read from the node's memory, mapped into this process.

Owns: the extents mapped so far, and the connections that say where pages are.
Invariant: a page is OK only if its stamp was unchanged after its last byte was used, and a whole page only if its checksum matched
as well. A recycled slot, an extent that went to another tenant and a node that is gone are misses.

Pages are written through another transport: the mapping is read-only.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from attnstore.client.bulk import BulkUnavailable, OpenChannel, ReadPlan, Transfer, all_layers
from attnstore.client.channel_pool import ChannelPool
from attnstore.client.mapped import Located, MappedExtent, PageViews
from attnstore.clock import Deadline
from attnstore.core.hashing import page_checksum
from attnstore.errors import AttnStoreError, InvalidArgument, Overloaded, ProtocolError, Unavailable
from attnstore.types import PageStatus
from attnstore.wire import shared
from attnstore.wire.shared import ANSWERS, ExtentLayout, Kind, Place, Welcome
from attnstore.wire.shared_stream import Message, SharedStream

_CONNECT_MS_MAX = 2_000
_HASHES_PER_LOCATE = 256
"""Few enough that a page without a lease is copied soon after it was located, enough that asking costs nothing beside copying."""


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """A checked request to use bytes `[begin, end)` of pages in place. `lease_id` is what keeps the pages there."""

    namespace: bytes
    hashes: tuple[bytes, ...]
    begin: int
    end: int
    lease_id: bytes
    deadline: Deadline
    transfer: Transfer = field(default_factory=Transfer)


class ShmTransport:
    """A `BulkReader`, and the only transport with `view`. For nodes on this host that run as the same user."""

    name = "shm"

    def __init__(self, open_channel: OpenChannel) -> None:
        self._open_channel = open_channel
        self._pool = ChannelPool(self._connect)
        self._lock = threading.Lock()
        self._epoch = b""
        self._extents: dict[int, _Known] = {}

    @staticmethod
    def is_reachable(address: str) -> bool:
        """Whether `address`, as `Describe` gives it, names a socket that this process sees: the node is on this host."""
        return os.path.exists(address)

    def close(self) -> None:
        """Breaks what runs and lets the memory go; views that are held stay readable."""
        self._pool.close()
        with self._lock:
            self._extents.clear()

    def read(self, plan: ReadPlan) -> None:
        """See `BulkReader.read`. Whole pages are verified by their checksums, layer ranges by their stamps alone.

        The node's checksum is that of the whole page; one made now, of bytes in the same memory, would prove nothing. `on_layer`
        is called when all layers are there.
        """
        begin, end = plan.layer_begin * plan.layer_bytes, plan.layer_end * plan.layer_bytes
        for at in range(0, len(plan.hashes), _HASHES_PER_LOCATE):
            hashes = tuple(plan.hashes[at : at + _HASHES_PER_LOCATE])
            try:
                pages = self._locate(plan.namespace, hashes, plan.lease_id, end, plan.deadline, plan.transfer)
            except BulkUnavailable as error:
                if at == 0:
                    raise
                raise Unavailable(str(error)) from None  # pages have landed: nobody else may begin this read
            for index, located in enumerate(pages, at):
                plan.deadline.left_ms()
                _land(plan, index, located, begin, end)
        if plan.on_layer is not None:
            all_layers(plan, plan.on_layer)

    def view(self, plan: ViewPlan) -> PageViews:
        """The pages where they lie; see `PageViews`. Errors as in `BulkReader.read`."""
        located: list[Located] = []
        for at in range(0, len(plan.hashes), _HASHES_PER_LOCATE):
            hashes = plan.hashes[at : at + _HASHES_PER_LOCATE]
            located += self._locate(plan.namespace, hashes, plan.lease_id, plan.end, plan.deadline, plan.transfer)
        return PageViews(located, plan.begin, plan.end)

    def _locate(
        self,
        namespace: bytes,
        hashes: tuple[bytes, ...],
        lease_id: bytes | None,
        end: int,
        deadline: Deadline,
        transfer: Transfer,
    ) -> list[Located]:
        def ask(channel: _Channel) -> list[Located]:
            places = channel.locate(namespace, lease_id, hashes, deadline)
            return [place if isinstance(place, PageStatus) else self._mapped(channel, place, end, deadline) for place in places]

        return self._pool.exchange(deadline, transfer, ask)

    def _mapped(self, channel: _Channel, place: Place, end: int, deadline: Deadline) -> Located:
        if end > place.size_bytes:
            raise ProtocolError(f"the node holds {place.size_bytes} bytes of a page of which {end} were asked for")
        known = self._extents.get(place.extent)
        if known is None or known.tenancy != place.tenancy or known.epoch != channel.welcome.epoch:
            extent = channel.map(place, deadline)
            if extent is None:
                return PageStatus.MISSING
            known = _Known(channel.welcome.epoch, place.tenancy, extent)
            with self._lock:
                self._extents[place.extent] = known
        return place, known.extent

    def _connect(self, deadline: Deadline) -> _Channel:
        try:
            address, token = self._open_channel(self.name, deadline)
        except (InvalidArgument, Overloaded) as error:
            # The node was restarted without this transport, or gives out no more tokens for now.
            raise BulkUnavailable(f"the node opens no shared memory: {error}") from None
        soon = deadline.sooner(_CONNECT_MS_MAX)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(soon.left_ms() / 1000)
            connection.connect(address)
            channel = _Channel.opened(SharedStream(connection), token, soon)
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


class _Known(NamedTuple):
    """A mapped extent and whose memory it is."""

    epoch: bytes
    tenancy: int
    extent: MappedExtent


def _land(plan: ReadPlan, index: int, located: Located, begin: int, end: int) -> None:
    """Copies one page into its buffer."""
    if isinstance(located, PageStatus):
        plan.landing.miss(index, located)
        return
    place, extent = located
    if not extent.holds(place):
        plan.landing.miss(index, PageStatus.MISSING)
        return
    window = plan.landing.window(index, 0, end - begin)
    assert window is not None, "no page lands twice in one read"
    extent.copy(place.offset_bytes + begin, window)
    intact = len(window) < place.size_bytes or page_checksum(window) == place.checksum
    # Only now: whatever the node did while we copied, it changed the stamp first.
    if not extent.holds(place):
        plan.landing.miss(index, PageStatus.MISSING)
        return
    plan.landing.landed(index, len(window))
    plan.landing.judge(index, intact)


class _Channel:
    """One open connection: a client's half of the protocol."""

    answered = False
    """Asking again is always harmless."""

    def __init__(self, stream: SharedStream, welcome: Welcome) -> None:
        self.welcome = welcome
        self._stream = stream
        self._layout = ExtentLayout(welcome.extent_bytes)

    @classmethod
    def opened(cls, stream: SharedStream, token: bytes, deadline: Deadline) -> _Channel:
        """Says HELLO and waits for WELCOME. Raises `BulkUnavailable`."""
        try:
            answer = _ask(stream, Kind.HELLO, shared.encode_hello(token), deadline)
            return cls(stream, shared.decode_welcome(answer.count, answer.payload))
        except AttnStoreError as error:
            raise BulkUnavailable(f"shared memory was not opened: {error}") from None

    def locate(
        self, namespace: bytes, lease_id: bytes | None, hashes: tuple[bytes, ...], deadline: Deadline
    ) -> list[Place | PageStatus]:
        """Where the pages are."""
        places: list[Place | PageStatus] = []
        for at in range(0, len(hashes), self.welcome.hashes_max):
            part = hashes[at : at + self.welcome.hashes_max]
            answer = _ask(self._stream, Kind.LOCATE, shared.encode_locate(namespace, lease_id, part), deadline)
            if answer.count != len(part):
                raise ProtocolError(f"the node placed {answer.count} pages of {len(part)}")
            places += shared.decode_located(answer.payload, self._layout)
        return places

    def map(self, place: Place, deadline: Deadline) -> MappedExtent | None:
        """The extent of a place; None where it has another tenant by now."""
        answer = _ask(self._stream, Kind.MAP, shared.encode_map(place.extent, place.tenancy), deadline)
        if answer.kind is Kind.GONE:
            return None
        if answer.descriptor is None:
            raise ProtocolError("the node's MAPPED came without a descriptor")
        try:
            return MappedExtent(answer.descriptor, self._layout)
        finally:
            os.close(answer.descriptor)

    def shutdown(self) -> None:
        self._stream.shutdown()

    def close(self) -> None:
        self._stream.close()


def _ask(stream: SharedStream, kind: Kind, request: bytes, deadline: Deadline) -> Message:
    """One question, one answer. Raises what the node refused it with."""
    stream.bound(deadline.left_ms)
    stream.send(request)
    answer = stream.receive(ANSWERS[kind])
    if answer.kind is Kind.REFUSED:
        raise shared.decode_refusal(answer.payload)
    return answer
