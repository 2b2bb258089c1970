"""Trust in the records of a directory: which are believed, and how they are signed.

Owns: the format of a signed record: its text, the time of signing in milliseconds since 1970, and the signature, one line each.
Invariants: a reader with the cluster's key believes no unsigned record; a reader that saw a newer record of a name does not believe
an older one, and no reader believes a node's record for longer than `RECORD_SIGNED_MS_MAX`; a reader that uses TLS ignores nodes
without TLS.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from attnstore.directory.members import Member, RecordKind, reading_record
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import CLOCKS_APART_MS_MAX, NODES_MAX, RECORD_AGAIN_MS, RECORD_BYTES_MAX, RECORD_SIGNED_MS_MAX

if TYPE_CHECKING:  # its package is an optional dependency
    from attnstore.cluster_key import ClusterKey, PublicKey


def wall_clock_ms() -> int:
    """Returns milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class MemberCheck:
    """Identifies a member by a challenge that only a holder of the cluster's key can answer."""

    member: Member
    cluster: str
    public: PublicKey

    def is_passed(self, challenge: bytes, proof: str) -> bool:
        """Returns whether the answer to the challenge comes from this member, in this incarnation, at this URL."""
        return self.public.has_signed(proof, "proof", *identity_fields(self.cluster, self.member), challenge.hex())


def identity_fields(cluster: str, member: Member) -> tuple[str, str, str, str]:
    """Returns the fields of a node's identity that are signed."""
    return (cluster, member.node_id, member.epoch.hex(), member.url)


class Trust:
    """The trust of one reader or writer of a cluster's records. `key` signs, `public` verifies; without them nothing is checked."""

    def __init__(
        self,
        cluster: str,
        public: PublicKey | None = None,
        key: ClusterKey | None = None,
        *,
        tls_only: bool = False,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        """Raises `InvalidArgument` for two keys that are not a pair."""
        if key is not None and public is not None and key.public != public:
            raise InvalidArgument("the cluster's key is not the one of the key=... in the directory's URL")
        self._cluster = cluster
        self._key = key
        self._public = key.public if key is not None else public
        self._tls_only = tls_only
        self._now_ms = now_ms
        self._newest_ms: dict[tuple[RecordKind, str], int] = {}
        self._signed: dict[tuple[RecordKind, str], tuple[str, int]] = {}
        self._is_signed = lru_cache(maxsize=2 * NODES_MAX)(self._check)

    def sealed(self, kind: RecordKind, name: str, text: str) -> str:
        """Returns the record to write. Equal texts give equal records for a while, so that a heartbeat changes nothing."""
        if self._key is None:
            return text
        now_ms, last = self._now_ms(), self._signed.get((kind, name))
        if last is None or last[0] != text or now_ms - last[1] >= RECORD_AGAIN_MS:
            last = (text, now_ms if last is None else max(now_ms, last[1] + 1))
            self._signed[kind, name] = last
        signature = self._key.sign(kind.value, self._cluster, name, last[1], text)
        return f"{text}\n{last[1]}\n{signature}"

    def opened(self, kind: RecordKind, name: str, record: bytes) -> str:
        """Returns the text of a record. Raises `ProtocolError` for a record that is not believed."""
        with reading_record(kind.value):
            if len(record) > RECORD_BYTES_MAX:
                raise ValueError(f"it has more than {RECORD_BYTES_MAX} bytes")
            text, *signed = record.decode().split("\n")
        if self._public is None:
            return text
        signed_ms = int(signed[0]) if len(signed) == 2 and signed[0].isdecimal() and len(signed[0]) < 16 else None
        if signed_ms is None or not self._is_signed(kind, name, text, signed_ms, signed[1]):
            raise ProtocolError(f"the directory's record of {kind.value} {name!r} is not signed with the cluster's key")
        age_ms = self._now_ms() - signed_ms
        if age_ms < -CLOCKS_APART_MS_MAX or (kind is RecordKind.NODE and age_ms > RECORD_SIGNED_MS_MAX):
            raise ProtocolError(f"the directory's record of {kind.value} {name!r} was signed {age_ms / 1e3:.0f} s ago")
        if signed_ms < self._newest_ms.get((kind, name), 0):
            raise ProtocolError(f"the directory's record of {kind.value} {name!r} is older than one that was there before")
        self._newest_ms[kind, name] = signed_ms
        return text

    def check_member(self, member: Member) -> None:
        """Raises `ProtocolError` for a node without TLS if the reader uses TLS."""
        if self._tls_only and not member.url.startswith("grpcs://"):
            raise ProtocolError(f"node {member.node_id!r} is not reached over TLS, as this cluster's nodes are")

    def check_of(self, member: Member) -> MemberCheck | None:
        """Returns the check that identifies the member before anything is sent to it, or None if nothing is checked."""
        return None if self._public is None else MemberCheck(member, self._cluster, self._public)

    def _check(self, kind: RecordKind, name: str, text: str, signed_ms: int, signature: str) -> bool:
        assert self._public is not None
        return self._public.has_signed(signature, kind.value, self._cluster, name, signed_ms, text)
