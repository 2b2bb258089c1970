"""A directory may contain anything: bad records are skipped one by one, and only `ProtocolError` is ever raised."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.directory import EventBatch, Intent, LayoutRecord, Member, Membership
from attnstore.directory.events import events_in
from attnstore.directory.members import RecordKind
from attnstore.directory.records import RecordReader, Told
from attnstore.directory.trust import Trust
from attnstore.directory.view import ViewTracker
from attnstore.errors import ProtocolError
from attnstore.limits import HOT_SEGMENTS_MAX, QUOTA_BYTES_MAX, RECORD_BYTES_MAX
from attnstore.types import Space

ADA = Member("ada", "grpc://10.0.0.1:7400", bytes(16), weight=2.0, replicas=2)
CLEO = replace(ADA, node_id="cleo")
LAYOUT = LayoutRecord(bytes(32), "tenant", 4096)


def with_field(field: str) -> str:
    """Returns Ada's record with an additional last field, which wins if the name occurs twice."""
    return ADA.to_json()[:-1] + ", " + field + "}"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nonsense",
        '{"node_id": 1}',
        b"\xff\xfe",
        "[" * 10_000,
        "9" * 5_000,
        " " * RECORD_BYTES_MAX + "{}",
        with_field('"replicas": 1e999'),
        with_field('"replicas": NaN'),
        with_field('"replicas": null'),
        with_field('"state": "hibernating"'),
        with_field('"state": []'),
        with_field('"hot": 5'),
        with_field(f'"weight": 1{"0" * 400}'),
    ],
)
def test_a_record_of_somebody_else_is_a_typed_error(text: str | bytes) -> None:
    with pytest.raises(ProtocolError, match="no node's"):
        Member.from_json(text)


@pytest.mark.parametrize(
    "field",
    [
        '"weight": 0',
        '"weight": NaN',
        '"weight": -1',
        '"weight": 1e6',
        '"replicas": 0',
        '"replicas": 99',
        '"epoch": "00"',
        '"node_id": ""',
        '"node_id": "a\\u001b[2J"',
        '"node_id": "\\ud800"',
        '"url": "http://10.0.0.1:7400"',
        '"url": "grpc://10.0.0.1"',
        '"url": "grpc://10.0.0.1:0"',
        '"url": "grpc://10.0.0.1\\n:7400"',
        '"hot": ["00"]',
        f'"hot": {json.dumps([f"{number:014x}" for number in range(HOT_SEGMENTS_MAX + 1)])}',
    ],
)
def test_a_record_out_of_bounds_is_a_typed_error(field: str) -> None:
    with pytest.raises(ProtocolError, match="out of bounds"):
        Member.from_json(with_field(field))


def json_text(record: str) -> st.SearchStrategy[str | bytes]:
    """Lines that may follow a valid one: any JSON, malformed JSON, and other text."""
    scalars = st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**310) | st.floats() | st.text()
    values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    parsed = json.loads(record)
    names = st.sampled_from(sorted(parsed)) if isinstance(parsed, dict) else st.text()
    overridden = st.dictionaries(names, values).map(lambda fields: {**parsed, **fields} if isinstance(parsed, dict) else fields)
    doubled = st.tuples(names, values).map(lambda pair: f"{record[:-1]}, {json.dumps(pair[0])}: {json.dumps(pair[1])}}}")
    cut = st.integers(0, len(record)).map(lambda end: record[:end])
    return values.map(json.dumps) | overridden.map(json.dumps) | doubled | cut | st.text() | st.binary()


MEMBERS = json_text(ADA.to_json())


@given(MEMBERS)
def test_whatever_a_member_record_says_it_is_a_member_or_a_protocol_error(text: str | bytes) -> None:
    try:
        member = Member.from_json(text)
    except ProtocolError:
        return
    assert Member.from_json(member.to_json()) == member


@given(json_text(LAYOUT.to_json()))
def test_whatever_a_layout_record_says_it_is_a_layout_or_a_protocol_error(text: str | bytes) -> None:
    try:
        record = LayoutRecord.from_json(text)
    except ProtocolError:
        return
    assert LayoutRecord.from_json(record.to_json()) == record


def as_bytes(text: str | bytes) -> bytes:
    return text.encode(errors="surrogatepass") if isinstance(text, str) else text


def flat(entries: list[tuple[Any, Any]]) -> list[bytes]:
    """Returns a hash as the server sends it."""
    return [as_bytes(part) for entry in entries for part in entry]


NAMES = st.text() | st.binary()
HASHES = st.lists(st.tuples(NAMES, MEMBERS)), st.lists(st.tuples(NAMES, NAMES | st.sampled_from(["drain", "evict"])))
QUOTAS = st.lists(st.tuples(NAMES, NAMES | st.integers().map(str)))


@given(*HASHES, QUOTAS, st.booleans())
def test_good_records_are_read_whatever_stands_beside_them(
    members: list[tuple[Any, Any]], intents: list[tuple[Any, Any]], quotas: list[tuple[Any, Any]], as_map: bool
) -> None:
    answer: list[Any] = [b"incarnation", b"7", 1]
    for others, good in ((members, ("ada", ADA.to_json())), (intents, ("ada", "drain")), (quotas, ("tenant", "5"))):
        whole = flat([*others, good])
        answer.append(dict(zip(whole[::2], whole[1::2], strict=True)) if as_map else whole)
    answer.insert(4, [])
    reader = RecordReader("redis://h", Trust("default"))
    membership = reader.membership(answer, Told())
    assert membership is not None
    assert ADA in membership.members
    assert (membership.intents["ada"], membership.quota_bytes["tenant"]) == (Intent.DRAIN, 5)
    view = ViewTracker().observe(membership, 0.0)
    assert all(0 <= quota_bytes <= QUOTA_BYTES_MAX for quota_bytes in view.quota_bytes_of("ada").values())


@given(st.lists(st.none() | st.binary() | st.integers() | st.lists(st.binary(), max_size=3), max_size=8))
def test_an_answer_without_a_revision_is_a_protocol_error(answer: list[Any]) -> None:
    try:
        membership = RecordReader("redis://h", Trust("default")).membership(answer, Told())
    except ProtocolError:
        return
    assert membership is None or isinstance(membership, Membership)


@given(st.lists(st.dictionaries(st.sampled_from([b"node", b"packed", b"dropped"]) | st.binary(), st.binary())))
def test_good_events_are_read_whatever_stands_beside_them(entries: list[dict[bytes, bytes]]) -> None:
    good = {b"node": b"ada", b"packed": bytes([1]) + bytes(72), b"dropped": b"2"}
    batches = RecordReader("redis://h", Trust("default")).events([(b"1-0", fields) for fields in [*entries, good]])
    assert batches[-1] == EventBatch("ada", good[b"packed"], 2)
    assert all(list(events_in(batch, Space("tenant", bytes(32)))) is not None for batch in batches)


@pytest.mark.parametrize("packed", [b"short", b"\xff" * 73, (bytes([1]) + bytes(72)) * 1_025])
def test_events_of_somebody_else_are_skipped_and_counted(packed: bytes) -> None:
    reader = RecordReader("redis://h", Trust("default"))
    assert reader.events([(b"1-0", {b"node": b"ada", b"packed": packed, b"dropped": b"0"})]) == []
    assert reader.skipped[RecordKind.EVENTS] == 1


def test_what_is_skipped_is_counted_by_kind_until_it_is_gone_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = RecordReader("redis://h", Trust("default"))
    bad = [b"i", b"1", 1, flat([("bob", "no"), ("ada", ADA.to_json())]), [], flat([("ada", "explode")]), []]
    more = [b"i", b"2", 0, flat([("cleo", CLEO.to_json())]), [], None, None]
    good = [b"i", b"3", 0, [], [b"bob"], [], None]
    for answer in (bad, bad, more):
        reader.membership(answer, reader.known)
    assert {kind: count for kind, count in reader.skipped.items() if count} == {RecordKind.NODE: 1, RecordKind.INTENT: 1}
    assert len(caplog.records) == 2
    membership = reader.membership(good, reader.known)
    assert membership is not None
    assert membership.members == (ADA, CLEO)
    assert set(reader.skipped.values()) == {0}
