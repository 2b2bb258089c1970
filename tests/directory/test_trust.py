"""Signed records: which records are believed if someone else can write to the directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.cluster_key import ClusterKey, PublicKey
from attnstore.directory import Intent, Member, Membership
from attnstore.directory.members import RecordKind
from attnstore.directory.records import RecordReader, Told
from attnstore.directory.trust import Trust
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import CLOCKS_APART_MS_MAX, RECORD_AGAIN_MS, RECORD_SIGNED_MS_MAX

ADA = Member("ada", "grpcs://10.0.0.1:7400", bytes(16))
NODE = RecordKind.NODE


class WallClock:
    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> ClusterKey:
    return ClusterKey.create(tmp_path_factory.mktemp("keys") / "key")


@pytest.fixture(scope="module")
def other_key(tmp_path_factory: pytest.TempPathFactory) -> ClusterKey:
    return ClusterKey.create(tmp_path_factory.mktemp("keys") / "key")


def membership_in(trust: Trust, nodes: dict[str, str], intents: dict[str, str], quotas: dict[str, str]) -> Membership:
    def encoded(fields: dict[str, str]) -> dict[bytes, bytes]:
        return {name.encode(): text.encode() for name, text in fields.items()}

    answer = [b"i", b"1", 1, encoded(nodes), [], encoded(intents), encoded(quotas)]
    membership = RecordReader("redis://h", trust).membership(answer, Told())
    assert membership is not None
    return membership


def test_what_the_key_signed_is_believed_and_nothing_else(key: ClusterKey, other_key: ClusterKey, clock: WallClock) -> None:
    ours, theirs = Trust("blue", key=key, now_ms=clock), Trust("blue", key=other_key, now_ms=clock)
    elsewhere, nobody = Trust("green", key=key, now_ms=clock), Trust("blue", now_ms=clock)
    reader = Trust("blue", key.public, now_ms=clock)
    good = ours.sealed(NODE, "ada", ADA.to_json())
    moved = replace(ADA, url="grpcs://10.6.6.6:1").to_json()
    for name, record in {
        "ada": good,
        "bob": ours.sealed(NODE, "ada", ADA.to_json()),
        "unsigned": nobody.sealed(NODE, "unsigned", replace(ADA, node_id="unsigned").to_json()),
        "theirs": theirs.sealed(NODE, "theirs", replace(ADA, node_id="theirs").to_json()),
        "elsewhere": elsewhere.sealed(NODE, "elsewhere", replace(ADA, node_id="elsewhere").to_json()),
        "intent": ours.sealed(RecordKind.INTENT, "intent", replace(ADA, node_id="intent").to_json()),
        "changed": good.replace(ADA.to_json(), moved),
        "cut": good.rpartition("\n")[0],
    }.items():
        believed = membership_in(reader, {name: record}, {}, {}).members
        assert believed == ((ADA,) if name == "ada" else ()), name
    assert membership_in(nobody, {"ada": good}, {}, {}).members == (ADA,), "who has no key reads signed records too"


def test_what_operators_want_is_believed_where_it_is_signed(key: ClusterKey, clock: WallClock) -> None:
    operator, rogue = Trust("blue", key=key, now_ms=clock), Trust("blue", now_ms=clock)
    reader = Trust("blue", key.public, now_ms=clock)
    intents = {"ada": operator.sealed(RecordKind.INTENT, "ada", "drain"), "bob": rogue.sealed(RecordKind.INTENT, "bob", "evict")}
    quotas = {"a": operator.sealed(RecordKind.QUOTA, "a", "5"), "b": rogue.sealed(RecordKind.QUOTA, "b", "0")}
    clock.ms += 10 * RECORD_SIGNED_MS_MAX
    membership = membership_in(reader, {}, intents, quotas)
    assert (membership.intents, membership.quota_bytes) == ({"ada": Intent.DRAIN}, {"a": 5})


def test_an_old_record_is_not_believed_after_a_newer_one_and_by_nobody_for_long(key: ClusterKey, clock: WallClock) -> None:
    node, reader = Trust("blue", key=key, now_ms=clock), Trust("blue", key.public, now_ms=clock)
    old = node.sealed(NODE, "ada", ADA.to_json()).encode()
    new = node.sealed(NODE, "ada", replace(ADA, url="grpcs://10.0.0.2:7400").to_json()).encode()
    assert reader.opened(NODE, "ada", old)
    assert reader.opened(NODE, "ada", new)
    with pytest.raises(ProtocolError, match="older than one"):
        reader.opened(NODE, "ada", old)
    late = Trust("blue", key.public, now_ms=clock)
    assert late.opened(NODE, "ada", old)
    clock.ms += RECORD_SIGNED_MS_MAX + 1
    with pytest.raises(ProtocolError, match="was signed"):
        Trust("blue", key.public, now_ms=clock).opened(NODE, "ada", old)
    clock.ms -= RECORD_SIGNED_MS_MAX + CLOCKS_APART_MS_MAX + 100
    with pytest.raises(ProtocolError, match="was signed"):
        Trust("blue", key.public, now_ms=clock).opened(NODE, "ada", old)


def test_a_heartbeat_changes_nothing_until_the_record_is_signed_anew_or_the_node_changes(key: ClusterKey, clock: WallClock) -> None:
    node = Trust("blue", key=key, now_ms=clock)
    first = node.sealed(NODE, "ada", ADA.to_json())
    clock.ms += RECORD_AGAIN_MS - 1
    assert node.sealed(NODE, "ada", ADA.to_json()) == first
    clock.ms += 1
    assert node.sealed(NODE, "ada", ADA.to_json()) != first
    clock.ms -= 10 * RECORD_AGAIN_MS  # a clock that was set back
    changed = node.sealed(NODE, "ada", replace(ADA, weight=2.0).to_json())
    assert int(changed.split("\n")[1]) > int(first.split("\n")[1])


def test_who_uses_tls_follows_no_node_that_does_not(clock: WallClock) -> None:
    plain = replace(ADA, node_id="bob", url="grpc://10.0.0.2:7400")
    records = {member.node_id: member.to_json() for member in (ADA, plain)}
    assert membership_in(Trust("blue", tls_only=True, now_ms=clock), records, {}, {}).members == (ADA,)
    assert membership_in(Trust("blue", now_ms=clock), records, {}, {}).members == (ADA, plain)


def test_keys_that_are_no_pair_are_refused(key: ClusterKey, other_key: ClusterKey) -> None:
    with pytest.raises(InvalidArgument, match="not the one"):
        Trust("blue", other_key.public, key)


def test_a_key_file_is_its_owners_alone_and_never_written_over(tmp_path: Path, key: ClusterKey) -> None:
    path = tmp_path / "cluster.key"
    made = ClusterKey.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ClusterKey.load(path).public == made.public
    with pytest.raises(InvalidArgument, match="cannot be written"):
        ClusterKey.create(path)
    path.chmod(0o604)
    with pytest.raises(InvalidArgument, match="read by others"):
        ClusterKey.load(path)
    for text in (b"", b"nonsense", b"\xff"):
        bad = tmp_path / "bad"
        bad.touch(0o600)
        bad.write_bytes(text)
        with pytest.raises(InvalidArgument, match="not the key"):
            ClusterKey.load(bad)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        ClusterKey.load(tmp_path / "missing")
    assert "object at" in repr(key)


@pytest.mark.parametrize("text", ["", "short", "é" * 43, "A" * 42 + "B", "A" * 44, "/nowhere"])
def test_a_text_that_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        PublicKey.read(text)


LINES = st.lists(st.text() | st.integers().map(str) | st.just("A" * 86), min_size=1, max_size=4)


@given(record=LINES.map(lambda lines: "\n".join(lines).encode(errors="surrogatepass")) | st.binary())
def test_whatever_is_written_where_records_are_signed_is_refused_with_a_protocol_error(key: ClusterKey, record: bytes) -> None:
    with pytest.raises(ProtocolError):
        Trust("blue", key.public).opened(NODE, "ada", record)
