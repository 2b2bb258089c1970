"""Parses the answers of a directory without trusting them: it may be shared, or written to by others.

Owns: how the answers of the scripts become records. Invariant: an unreadable record is skipped and counted, and logged once, not
with every heartbeat; whatever is written into the directory causes no error but `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from attnstore.directory.deletions import Deletion
from attnstore.directory.events import check_events
from attnstore.directory.members import (
    EventBatch,
    Intent,
    LayoutRecord,
    Member,
    Membership,
    RecordKind,
    Revision,
    is_name,
    reading_record,
)
from attnstore.directory.trust import Trust
from attnstore.errors import ProtocolError
from attnstore.limits import QUOTA_BYTES_MAX
from attnstore.logs import get_logger

R = TypeVar("R")
T = TypeVar("T")

_log = get_logger(__name__)
_NAME_CHARS = 64


@dataclass(frozen=True, slots=True)
class Told:
    """The records of a revision as the directory reported them, updated with later changes. Initially empty."""

    revision: Revision | None = None
    nodes: Mapping[bytes, bytes] = field(default_factory=dict)
    intents: Mapping[bytes, bytes] = field(default_factory=dict)
    quotas: Mapping[bytes, bytes] = field(default_factory=dict)


class RecordReader:
    """Parses the answers of one directory; `directory` is its name in messages."""

    def __init__(self, directory: str, trust: Trust) -> None:
        self._directory = directory
        self._trust = trust
        self._reasons: dict[RecordKind, list[str]] = {}
        self._told = Told()

    @property
    def skipped(self) -> dict[RecordKind, int]:
        """See `Directory.skipped`."""
        return {kind: len(self._reasons.get(kind, ())) for kind in RecordKind}

    @property
    def known(self) -> Told:
        """The result of the last answer, for `membership` of the next one."""
        return self._told

    def membership(self, answer: Any, before: Told) -> Membership | None:
        """Parses the answer of the script MEMBERSHIP or ANNOUNCE to a request for changes since `before`. Returns None if there are
        none.

        Raises `ProtocolError` if not even the revision can be read.
        """
        if not answer:
            return None
        with reading_record("revision"):
            incarnation, number, is_all, records, gone, intents, quotas = answer
            revision = Revision(incarnation.decode(), int(number))
            nodes = dict(pairs(records)) if is_all else {**before.nodes, **dict(pairs(records))}
            for name in gone:
                nodes.pop(name, None)
            self._told = Told(
                revision,
                nodes,
                before.intents if intents is None else dict(pairs(intents)),
                before.quotas if quotas is None else dict(pairs(quotas)),
            )
        return Membership(
            revision,
            tuple(self._read(RecordKind.NODE, nodes.items(), self._member)),
            dict(self._read(RecordKind.INTENT, self._told.intents.items(), self._intent)),
            dict(self._read(RecordKind.QUOTA, self._told.quotas.items(), self._quota)),
        )

    def layouts(self, records: Iterable[bytes]) -> list[LayoutRecord]:
        """Parses the answer of the script LAYOUTS."""
        return self._read(RecordKind.LAYOUT, records, LayoutRecord.from_json)

    def deletions(self, answer: Any) -> list[Deletion]:
        """Parses the answer of the script DELETIONS, with current ages."""
        now_ms, entries = answer
        return self._read(RecordKind.DELETION, entries, lambda entry: self._deletion(entry, now_ms))

    def events(self, entries: Iterable[Any]) -> list[EventBatch]:
        """Parses the stream of events."""
        return self._read(RecordKind.EVENTS, entries, _batch)

    def _member(self, entry: tuple[bytes, bytes]) -> Member:
        name, text = self._opened(RecordKind.NODE, entry)
        member = Member.from_json(text)
        if member.node_id != name:
            raise ProtocolError(f"the directory has a record of node {member.node_id!r} under another name")
        self._trust.check_member(member)
        return member

    def _intent(self, entry: tuple[bytes, bytes]) -> tuple[str, Intent]:
        node_id, text = self._opened(RecordKind.INTENT, entry)
        if not is_name(node_id):
            raise ProtocolError("the directory has an intent for what is no node's name")
        with reading_record("intent"):
            return node_id, Intent(text)

    def _quota(self, entry: tuple[bytes, bytes]) -> tuple[str, int]:
        tenant, text = self._opened(RecordKind.QUOTA, entry)
        with reading_record("quota"):
            quota_bytes = int(text)
        if not 0 <= quota_bytes <= QUOTA_BYTES_MAX:
            raise ProtocolError(f"the directory's quota of tenant {tenant[:_NAME_CHARS]!r} is out of bounds")
        return tenant, quota_bytes

    def _deletion(self, entry: tuple[bytes, list[bytes]], now_ms: int) -> Deletion:
        position, flat = entry
        with reading_record("deletion"):
            fields = dict(pairs(flat))
            at_ms = int(position.partition(b"-")[0])
            opened = (fields[b"node"], fields[b"deletion"])
        _, text = self._opened(RecordKind.DELETION, opened)
        return Deletion.from_json(text).aged(now_ms - at_ms)

    def _opened(self, kind: RecordKind, entry: tuple[bytes, bytes]) -> tuple[str, str]:
        name, record = entry
        with reading_record(kind.value):
            text = name.decode()
        return text, self._trust.opened(kind, text, record)

    def _read(self, kind: RecordKind, raw: Iterable[R], read: Callable[[R], T]) -> list[T]:
        found: list[T] = []
        reasons: list[str] = []
        for each in raw:
            try:
                found.append(read(each))
            except ProtocolError as error:
                reasons.append(str(error))
        if reasons != self._reasons.get(kind, []):
            self._reasons[kind] = reasons
            if reasons:
                _log.warning(
                    "records of the directory are skipped",
                    directory=self._directory,
                    kind=kind.value,
                    records=len(reasons),
                    first_reason=reasons[0],
                )
        return found


def pairs(flat: Any) -> Any:
    """Returns the fields of a hash, which arrives as a map or as alternating names and values."""
    return flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)


def _batch(entry: tuple[bytes, dict[bytes, bytes]]) -> EventBatch:
    _, fields = entry
    with reading_record("batch of events"):
        batch = EventBatch(fields[b"node"].decode(), fields[b"packed"], int(fields[b"dropped"]))
    check_events(batch)
    return batch
