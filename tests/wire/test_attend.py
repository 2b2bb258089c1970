"""The attend stream's payloads: encoding and decoding on both transports, and the refusal of malformed or too large ones."""

from __future__ import annotations

import contextlib
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError, InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_FRAME_BYTES_MAX,
    ATTEND_HASHES_MAX,
    ATTEND_HEADS_MAX,
    ATTEND_ROWS_MAX,
    ATTEND_SETS_MAX,
    DEADLINE_MS_MAX,
)
from attnstore.wire.attend import (
    WINDOWED,
    AttendClose,
    AttendOpen,
    AttendQuery,
    AttendShape,
    decode_open,
    decode_query,
    encode_open,
    encode_sets,
    partial_from_wire,
    partial_to_wire,
    query_of,
    step_from_wire,
    step_to_wire,
)
from attnstore.wire.messages import METHODS

NAMESPACE = bytes(range(32))
SHAPE = AttendShape(NAMESPACE, q_heads=9, scale=0.125)
LEASE = bytes(range(16))
HASH = bytes(32)
U32 = st.integers(0, 2**32 - 1)
BUDGETS_MS = st.integers(0, DEADLINE_MS_MAX)

opens = st.builds(
    AttendOpen,
    U32,
    st.builds(
        AttendShape,
        st.just(NAMESPACE),
        st.integers(1, ATTEND_HEADS_MAX),
        st.floats(allow_nan=False, allow_infinity=False),
        st.one_of(st.just(0), U32),
    ),
    st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=9),
    st.just(LEASE),
)
sets_of_rows = st.lists(st.tuples(U32, st.integers(1, 4)), min_size=1, max_size=9).map(tuple)
whole_queries = st.builds(AttendQuery, U32, BUDGETS_MS, sets_of_rows, st.binary(max_size=64))


@st.composite
def windowed_queries(draw: st.DrawFn) -> AttendQuery:
    sets = draw(sets_of_rows)
    rows = sum(count for _, count in sets)
    firsts = draw(st.lists(U32, min_size=rows, max_size=rows))
    return query_of(draw(U32), draw(BUDGETS_MS), sets, draw(st.binary(max_size=64)), firsts)


queries = st.one_of(whole_queries, windowed_queries())


@given(opens)
def test_an_open_crosses_the_page_channel_unchanged(opening: AttendOpen) -> None:
    assert decode_open(opening.set_id, NAMESPACE, LEASE, encode_open(opening)) == opening


@given(queries)
def test_a_query_crosses_the_page_channel_unchanged(query: AttendQuery) -> None:
    payload = memoryview(encode_sets(query.sets, windowed=query.windowed) + bytes(query.rows))
    assert decode_query(query.layer, query.budget_ms, len(query.sets), payload) == query


@given(st.one_of(opens, queries, st.builds(AttendClose, U32)))
def test_a_step_crosses_grpc_unchanged(step: AttendOpen | AttendQuery | AttendClose) -> None:
    method = METHODS["Attend"]
    assert step_from_wire(method.decode_request(method.encode_request(step_to_wire(step)))) == step


@given(U32, st.integers(0, 2**64 - 1), st.integers(0, 2 * ATTEND_SETS_MAX), st.binary(max_size=400))
def test_any_payload_gives_a_step_or_a_typed_error(layer: int, budget_ms: int, sets: int, payload: bytes) -> None:
    for decode in (
        lambda: decode_query(layer, budget_ms, sets, memoryview(payload)),
        lambda: decode_open(layer, NAMESPACE, LEASE, payload),
        lambda: step_from_wire(METHODS["Attend"].decode_request(payload)),
    ):
        with contextlib.suppress(AttnStoreError):
            decode()


@pytest.mark.parametrize(
    ("q_heads", "scale", "hashes", "lease"),
    [
        (0, 1.0, [HASH], LEASE),
        (ATTEND_HEADS_MAX + 1, 1.0, [HASH], LEASE),
        (1, math.nan, [HASH], LEASE),
        (1, math.inf, [HASH], LEASE),
        (1, 1.0, [], LEASE),
        (1, 1.0, [HASH] * (ATTEND_HASHES_MAX + 1), LEASE),
        (1, 1.0, [HASH], b""),
    ],
    ids=["no heads", "many heads", "nan", "inf", "no pages", "many pages", "no lease"],
)
def test_an_open_beyond_the_limits_is_refused(q_heads: int, scale: float, hashes: list[bytes], lease: bytes) -> None:
    with pytest.raises(InvalidArgument):
        AttendOpen(0, AttendShape(NAMESPACE, q_heads, scale), hashes, lease)


@pytest.mark.parametrize(
    ("sets", "rows"),
    [
        ([], b""),
        ([(0, 1)] * (ATTEND_SETS_MAX + 1), b""),
        ([(0, 0)], b""),
        ([(0, 1), (1, 0)], b""),
        ([(0, ATTEND_ROWS_MAX + 1)], b""),
        ([(0, 1)], bytes(ATTEND_BYTES_MAX + 1)),
    ],
    ids=["no sets", "many sets", "no rows", "a set without rows", "many rows", "many bytes"],
)
def test_a_query_beyond_the_limits_is_refused(sets: list[tuple[int, int]], rows: bytes) -> None:
    with pytest.raises(InvalidArgument):
        AttendQuery(0, 0, tuple(sets), rows)


@pytest.mark.parametrize("value_dim", [-1, 1 << 32])
def test_a_value_dim_that_is_no_length_is_refused(value_dim: int) -> None:
    with pytest.raises(InvalidArgument, match="value_dim"):
        AttendOpen(0, AttendShape(NAMESPACE, 1, 1.0, value_dim), [HASH], LEASE)


def test_first_keys_and_rows_are_told_apart() -> None:
    query = query_of(3, 5, [(7, 1), (8, 2)], b"vectors", [0, 17, 2**32 - 1])
    assert struct.unpack("<3I", query.firsts) == (0, 17, 2**32 - 1)
    assert query.vectors == b"vectors"
    plain = query_of(3, 5, [(7, 1), (8, 2)], b"vectors")
    assert (plain.windowed, bytes(plain.firsts), bytes(plain.vectors)) == (False, b"", b"vectors")


@pytest.mark.parametrize("firsts", [[1], [1, 2, 3], [1, -1], [1, 1 << 32]], ids=["few", "many", "negative", "above 32 bits"])
def test_first_keys_that_are_not_one_number_for_each_row_are_refused(firsts: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="first key"):
        query_of(0, 0, [(0, 2)], b"", firsts)


def test_a_windowed_query_without_room_for_its_first_keys_is_refused() -> None:
    for rows in (b"", bytes(7)):
        with pytest.raises(InvalidArgument, match="bytes"):
            AttendQuery(0, 0, ((0, 2),), rows, windowed=True)


def test_the_largest_query_may_be_windowed() -> None:
    query = query_of(0, 0, [(0, ATTEND_ROWS_MAX)], bytes(ATTEND_BYTES_MAX), [0] * ATTEND_ROWS_MAX)
    sets = encode_sets(tuple((number, 1) for number in range(ATTEND_SETS_MAX)), windowed=True)
    assert len(query.vectors) == ATTEND_BYTES_MAX
    assert len(sets) + len(bytes(query.rows)) <= ATTEND_FRAME_BYTES_MAX


def test_first_keys_for_some_sets_only_are_refused() -> None:
    for heads in ((1 + WINDOWED, 1), (1, 1 + WINDOWED)):
        payload = struct.pack("<4I", 0, heads[0], 1, heads[1]) + bytes(64)
        with pytest.raises(InvalidArgument):
            decode_query(0, 0, 2, memoryview(payload))


def test_a_node_that_knows_no_windows_refuses_a_windowed_query() -> None:
    """What such a node makes of it: on the page channel too many rows, over gRPC rows of another size than their number's."""
    query = query_of(0, 0, [(0, 1)], bytes(256), [5])
    [(_, rows)] = struct.iter_unpack("<II", encode_sets(query.sets, windowed=True))
    assert rows > ATTEND_ROWS_MAX
    message = step_to_wire(query)
    message.query.ClearField("windowed")
    plain = step_from_wire(message)
    assert isinstance(plain, AttendQuery)
    assert len(bytes(plain.rows)) == plain.total_rows * 256 + 4


@pytest.mark.parametrize("value_dim", [0, 512])
def test_a_node_that_knows_no_latents_reads_an_open_as_before(value_dim: int) -> None:
    """It refuses the queries: their rows have the elements of K and of V together."""
    payload = encode_open(AttendOpen(0, AttendShape(NAMESPACE, 9, 0.125, value_dim), [HASH], LEASE))
    assert struct.unpack("<I4xd", payload[:16]) == (9, 0.125)
    assert payload[4:8] == struct.pack("<I", value_dim)
    assert PageLayout.of_latents(layers=1, row_dim=576).head_dim * 2 == 576


@pytest.mark.parametrize("budget_ms", [-1, DEADLINE_MS_MAX + 1, 2**32 - 1, 2**63])
def test_a_budget_that_is_no_time_to_wait_is_refused(budget_ms: int) -> None:
    with pytest.raises(InvalidArgument, match="budget_ms"):
        AttendQuery(0, budget_ms, ((0, 1),), b"")


def test_a_hash_list_that_is_cut_off_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="hash list"):
        decode_open(0, NAMESPACE, LEASE, struct.pack("<I4xd", 9, 0.125) + HASH[:31])


def test_a_message_without_a_step_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        step_from_wire(METHODS["Attend"].decode_request(b""))


def test_rows_and_partials_that_change_on_their_way_over_grpc_are_refused() -> None:
    method = METHODS["Attend"]
    query = step_to_wire(AttendQuery(0, 5, ((0, 1),), b"some rows"))
    query.query.rows = b"some rowz"
    with pytest.raises(ProtocolError, match="checksum"):
        step_from_wire(method.decode_request(method.encode_request(query)))
    answer = partial_to_wire(b"out", b"lse")
    assert partial_from_wire(answer) == (b"out", b"lse")
    answer.partial.lse = b"lsf"
    with pytest.raises(Unavailable, match="checksum"):
        partial_from_wire(answer)


def test_peers_that_know_no_checksum_of_attention_are_understood() -> None:
    query = step_to_wire(AttendQuery(0, 5, ((0, 1),), b"some rows"))
    query.query.ClearField("checksum")
    assert step_from_wire(query) == AttendQuery(0, 5, ((0, 1),), b"some rows")
    answer = partial_to_wire(b"out", b"lse")
    answer.partial.ClearField("checksum")
    assert partial_from_wire(answer) == (b"out", b"lse")
