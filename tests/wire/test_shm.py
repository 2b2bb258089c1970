"""The shared memory protocol: its encodings, its refusals, and the layout of an extent's file."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.errors import AttnStoreError, PermissionDenied, ProtocolError, Unavailable
from attnstore.limits import CHANNEL_REASON_BYTES_MAX, SHM_LENT_BYTES_MAX, SHM_LOCATE_HASHES_MAX, SHM_TAKE_PAGES_MAX
from attnstore.types import PageStatus
from attnstore.wire import shm
from attnstore.wire.shm import ANSWERS, HEADER_BYTES, REQUESTS, ExtentLayout, Item, Kind, Place, State, Welcome

NAMESPACE, LEASE, TOKEN, EPOCH = b"n" * 32, b"l" * 16, b"t" * 32, b"e" * 16
LAYOUT = ExtentLayout(1 << 20)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


def split(message: bytes, *expected: Kind) -> tuple[Kind, int, bytes]:
    """Returns kind, count and payload of a whole message."""
    kind, count, payload_bytes = shm.decode_header(message[:HEADER_BYTES], expected)
    assert len(message) == HEADER_BYTES + payload_bytes, "the header announces exactly what follows"
    return kind, count, message[HEADER_BYTES:]


@given(hashes=st.lists(st.binary(min_size=32, max_size=32), max_size=20), lease=st.none() | st.just(LEASE))
def test_a_locate_says_what_was_asked(hashes: list[bytes], lease: bytes | None) -> None:
    _, count, payload = split(shm.encode_locate(NAMESPACE, lease, hashes, (3, 9)), Kind.LOCATE)
    assert count == len(hashes)
    assert shm.decode_locate(payload) == (NAMESPACE, lease, hashes, (3, 9))


@given(
    places=st.lists(
        st.sampled_from([status for status in PageStatus if status is not PageStatus.OK])
        | st.builds(Place, U32, U64, st.integers(0, 1 << 19), st.integers(1, 1 << 19), U64, U64),
        max_size=20,
    )
)
def test_a_located_says_where_each_page_is_or_why_not(places: list[Place | PageStatus]) -> None:
    _, count, payload = split(shm.encode_located(places), Kind.LOCATED)
    assert count == len(places)
    assert shm.decode_located(payload, LAYOUT) == places


@given(items=st.lists(st.builds(Item, st.binary(min_size=32, max_size=32), U64, U64), max_size=20))
def test_a_take_says_what_is_offered_and_where(items: list[Item]) -> None:
    _, count, payload = split(shm.encode_take(NAMESPACE, items), Kind.TAKE)
    assert count == len(items)
    assert shm.decode_take(payload) == (NAMESPACE, items)


@given(verdicts=st.lists(st.sampled_from(list(PageStatus)), max_size=SHM_TAKE_PAGES_MAX))
def test_a_taken_gives_the_verdict_on_each(verdicts: list[PageStatus]) -> None:
    _, count, payload = split(shm.encode_taken(verdicts), Kind.TAKEN)
    assert count == len(verdicts)
    assert shm.decode_taken(payload) == verdicts


def test_a_verdict_of_no_meaning_is_a_broken_protocol() -> None:
    with pytest.raises(ProtocolError, match="250"):
        shm.decode_taken(bytes((PageStatus.STORED, 250)))


def test_a_lend_says_how_much_and_a_lent_nothing() -> None:
    assert shm.decode_lend(split(shm.encode_lend(4096), Kind.LEND)[2]) == 4096
    assert split(shm.encode_lent(), Kind.LENT) == (Kind.LENT, 0, b"")


@pytest.mark.parametrize("size_bytes", [0, SHM_LENT_BYTES_MAX + 1, (1 << 64) - 1])
def test_a_size_that_nobody_lends_is_a_broken_protocol(size_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="lent"):
        shm.decode_lend(shm.encode_lend(size_bytes)[HEADER_BYTES:])


def test_kinds_with_a_descriptor_are_known_to_both_sides() -> None:
    assert {Kind.LEND, Kind.MAPPED} == shm.WITH_DESCRIPTOR


@given(extent=U32, tenancy=U64)
def test_a_map_names_extent_and_tenancy(extent: int, tenancy: int) -> None:
    assert shm.decode_map(split(shm.encode_map(extent, tenancy), Kind.MAP)[2]) == (extent, tenancy)


@given(extent=st.integers(0, 1000), more=st.integers(0, 1000))
def test_a_mapped_says_which_bytes_of_the_file_the_extent_is(extent: int, more: int) -> None:
    offset_bytes, size_bytes = extent * 2 * LAYOUT.file_bytes, LAYOUT.file_bytes + more * 4096
    _, _, payload = split(shm.encode_mapped(offset_bytes, size_bytes), Kind.MAPPED)
    assert shm.decode_mapped(payload, LAYOUT) == (offset_bytes, size_bytes)


@pytest.mark.parametrize(
    ("offset_bytes", "size_bytes"),
    [(0, LAYOUT.file_bytes - 4096), (1, LAYOUT.file_bytes), (0, LAYOUT.file_bytes + 1), (1 << 62, LAYOUT.file_bytes), (0, 1 << 63)],
    ids=["too few", "offset off the grain", "size off the grain", "beyond any file", "more than any file"],
)
def test_bytes_that_hold_no_extent_are_a_broken_protocol(offset_bytes: int, size_bytes: int) -> None:
    _, _, payload = split(shm.encode_mapped(offset_bytes, size_bytes), Kind.MAPPED)
    with pytest.raises(ProtocolError):
        shm.decode_mapped(payload, LAYOUT)


def test_hello_and_welcome_carry_token_version_epoch_and_limits() -> None:
    assert split(shm.encode_hello(TOKEN), Kind.HELLO) == (Kind.HELLO, shm.VERSION, TOKEN)
    _, _, payload = split(shm.encode_welcome(Welcome(EPOCH, 1 << 26)), Kind.WELCOME)
    assert shm.decode_welcome(payload) == Welcome(EPOCH, 1 << 26)


def test_a_refusal_keeps_its_type_and_is_cut_to_its_limit() -> None:
    _, _, reason = split(shm.encode_refusal(PermissionDenied("not yours")), Kind.REFUSED)
    error = shm.decode_refusal(reason)
    assert (type(error), str(error)) == (PermissionDenied, "not yours")
    _, count, _ = split(shm.encode_refusal(PermissionDenied("x" * 10_000)), Kind.REFUSED)
    assert count == CHANNEL_REASON_BYTES_MAX
    assert type(shm.decode_refusal(b"of a later version\nwhy")) is Unavailable


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "expected", [*REQUESTS.values(), *ANSWERS.values()], ids=[*(state.name for state in REQUESTS), *(kind.name for kind in ANSWERS)]
)
def test_only_what_is_due_is_taken(kind: Kind, expected: frozenset[Kind]) -> None:
    header = struct.pack("<4sBxxxI", shm.MAGIC, kind, 0)
    if kind in expected:
        assert shm.decode_header(header, expected)[0] is kind
    else:
        with pytest.raises(ProtocolError, match="was due"):
            shm.decode_header(header, expected)


def test_every_request_has_an_answer_and_each_side_sends_its_own_kinds() -> None:
    requests = REQUESTS[State.NEW] | REQUESTS[State.OPEN]
    assert requests == ANSWERS.keys() == {kind for kind in Kind if kind < 16}
    assert {kind for answers in ANSWERS.values() for kind in answers} == {kind for kind in Kind if kind >= 16}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (Kind.LOCATE, SHM_LOCATE_HASHES_MAX + 1),
        (Kind.LOCATED, SHM_LOCATE_HASHES_MAX + 1),
        (Kind.MAP, 1),
        (Kind.LEND, 1),
        (Kind.TAKE, SHM_TAKE_PAGES_MAX + 1),
        (Kind.LENT, 1),
        (Kind.TAKEN, SHM_TAKE_PAGES_MAX + 1),
        (Kind.REFUSED, 4097),
    ],
)
def test_a_message_larger_than_its_limit_is_refused_at_its_header(kind: Kind, count: int) -> None:
    with pytest.raises(ProtocolError, match="maximum"):
        shm.decode_header(struct.pack("<4sBxxxI", shm.MAGIC, kind, count), {kind})


@given(header=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), expected=st.sampled_from(list(ANSWERS.values())))
def test_no_header_does_worse_than_a_protocol_error(header: bytes, expected: frozenset[Kind]) -> None:
    for start in (header, shm.MAGIC + header[4:]):
        try:
            kind, count, payload_bytes = shm.decode_header(start, expected)
        except ProtocolError:
            continue
        assert kind in expected
        assert count <= max(SHM_LOCATE_HASHES_MAX, CHANNEL_REASON_BYTES_MAX)
        assert payload_bytes <= 48 * SHM_LOCATE_HASHES_MAX


@given(payload=st.binary(max_size=48 * 4).map(lambda some: some[: len(some) // 48 * 48]))
def test_no_place_outside_its_extent_gets_through(payload: bytes) -> None:
    try:
        places = shm.decode_located(payload, LAYOUT)
    except ProtocolError:
        return
    for place in places:
        assert isinstance(place, PageStatus) or 0 < place.offset_bytes + place.size_bytes <= LAYOUT.extent_bytes


@pytest.mark.parametrize(("offset_bytes", "size_bytes"), [(0, 0), (0, (1 << 20) + 1), (1 << 20, 1), ((1 << 64) - 1, 2)])
def test_a_place_that_no_node_can_mean_is_refused(offset_bytes: int, size_bytes: int) -> None:
    payload = shm.encode_located([Place(0, 1, offset_bytes, size_bytes, 1, 1)])[HEADER_BYTES:]
    with pytest.raises(ProtocolError, match="outside its extent"):
        shm.decode_located(payload, LAYOUT)


def test_extents_of_no_bytes_and_an_unknown_status_are_refused() -> None:
    with pytest.raises(ProtocolError, match="no bytes"):
        shm.decode_welcome(EPOCH + bytes(8))
    with pytest.raises(ProtocolError, match="250"):
        shm.decode_located(struct.pack("<BxxxIQQQQQ", 250, 0, 0, 0, 0, 0, 0), LAYOUT)


def test_every_error_of_the_tree_survives_the_wire() -> None:
    def leaves(cls: type[AttnStoreError]) -> list[type[AttnStoreError]]:
        children = [child for child in cls.__subclasses__() if child.__module__ == "attnstore.errors"]
        return [leaf for child in children for leaf in leaves(child)] if children else [cls]

    for cls in leaves(AttnStoreError):
        assert type(shm.decode_refusal(shm.encode_refusal(cls("why"))[HEADER_BYTES:])) is cls


@given(extent_bytes=st.integers(1, 1 << 30), data=st.data())
def test_every_offset_has_a_stamp_and_stamps_and_data_do_not_overlap(extent_bytes: int, data: st.DataObject) -> None:
    layout = ExtentLayout(extent_bytes)
    assert extent_bytes <= layout.stamps_offset_bytes < extent_bytes + 4096
    assert layout.stamps_offset_bytes + 8 * layout.stamps <= layout.file_bytes
    assert layout.file_bytes % 4096 == 0
    assert layout.file_bytes - extent_bytes <= extent_bytes // 512 + 3 * 4096, "stamps cost a 512th"
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, extent_bytes - 1)] * 2)))
    assert 0 <= layout.stamp_index(first) <= layout.stamp_index(second) < layout.stamps
    assert (second - first < 4096) or layout.stamp_index(first) < layout.stamp_index(second)
