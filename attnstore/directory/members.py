"""The records that a directory stores: members, memberships, layouts and batches of events.

Owns: their fields, their JSON form and their bounds. Invariant: text that is not a record of its kind, or is out of bounds, raises
`ProtocolError` and nothing else, because others may write to the directory.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

from attnstore.address import Address
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import (
    EPOCH_BYTES,
    HASH_BYTES,
    HOT_SEGMENTS_MAX,
    NODE_ID_CHARS_MAX,
    NODE_URL_CHARS_MAX,
    NODE_WEIGHT_MAX,
    PAGE_BYTES_MAX,
    RECORD_BYTES_MAX,
    REPLICAS_MAX,
    SEGMENT_KEY_BYTES,
)

_REASON_CHARS = 200


class RecordKind(enum.StrEnum):
    """The kinds of records in a directory."""

    NODE = "node"
    INTENT = "intent"
    QUOTA = "quota"
    LAYOUT = "layout"
    EVENTS = "events"
    DELETION = "deletion"


class NodeState(enum.StrEnum):
    """The state of a node in its cluster."""

    ACTIVE = "active"
    """Owns its share of the segments."""
    DRAINING = "draining"
    """Owns no segment any more, hands over its pages and still answers."""
    DRAINED = "drained"
    """Has handed over everything: stopping it costs no hit."""


class Intent(enum.StrEnum):
    """What an operator wants of a node. Without one, the node serves."""

    DRAIN = "drain"
    EVICT = "evict"


@dataclass(frozen=True, slots=True)
class Member:
    """One node as its cluster knows it.

    `url` is where clients reach it. A new `epoch` means that it was restarted with an empty arena. `weight` is its share of the
    segments relative to other nodes. `replicas` is the number of copies that it is configured to keep (the cluster keeps the
    maximum over its members). `hot` are the keys of the segments used so often at this node that they should have a second copy.
    `left` counts the pages of a drained node that did not fit elsewhere.
    """

    node_id: str
    url: str
    epoch: bytes = b""
    weight: float = 1.0
    replicas: int = 1
    state: NodeState = NodeState.ACTIVE
    hot: frozenset[bytes] = frozenset()
    left: int = 0

    def to_json(self) -> str:
        """Returns one line; equal members have equal lines."""
        return json.dumps(
            {
                "node_id": self.node_id,
                "url": self.url,
                "epoch": self.epoch.hex(),
                "weight": self.weight,
                "replicas": self.replicas,
                "state": self.state.value,
                "hot": sorted(key.hex() for key in self.hot),
                "left": self.left,
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`. Raises `ProtocolError` for any other text, because others may write to the directory."""
        with reading_record("node"):
            fields = record_fields(text)
            member = cls(
                node_id=str(fields["node_id"]),
                url=str(fields["url"]),
                epoch=bytes.fromhex(fields["epoch"]),
                weight=float(fields["weight"]),
                replicas=int(fields["replicas"]),
                state=NodeState(fields["state"]),
                hot=frozenset(map(bytes.fromhex, fields.get("hot", ()))),
                left=int(fields.get("left", 0)),
            )
        good_names = is_name(member.node_id) and len(member.epoch) in (0, EPOCH_BYTES) and _is_node_url(member.url)
        good_heat = len(member.hot) <= HOT_SEGMENTS_MAX and all(len(key) == SEGMENT_KEY_BYTES for key in member.hot)
        good_share = 0 < member.weight <= NODE_WEIGHT_MAX and 1 <= member.replicas <= REPLICAS_MAX
        if not (good_names and good_heat and good_share and 0 <= member.left < 1 << 53):
            raise ProtocolError(f"the directory's record of node {member.node_id[:NODE_ID_CHARS_MAX]!r} is out of bounds")
        return member


@dataclass(frozen=True, slots=True)
class Revision:
    """The state of the directory to which a membership belongs. A new `incarnation` means that the directory has lost its data."""

    incarnation: str
    number: int


@dataclass(frozen=True, slots=True)
class Membership:
    """The members with a fresh heartbeat, the intents of operators, and the tenants' quotas in bytes over all nodes."""

    revision: Revision
    members: tuple[Member, ...]
    intents: Mapping[str, Intent] = field(default_factory=dict)
    quota_bytes: Mapping[str, int] = field(default_factory=dict)

    def present(self) -> dict[str, Member]:
        """Returns node id -> member with its intent applied: without evicted nodes, and draining from the moment that it is
        requested.
        """
        present = {}
        for member in self.members:
            intent = self.intents.get(member.node_id)
            if intent is Intent.EVICT:
                continue
            if intent is Intent.DRAIN and member.state is NodeState.ACTIVE:
                member = replace(member, state=NodeState.DRAINING)
            present[member.node_id] = member
        return present


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """A namespace of which some node of the cluster stores pages."""

    namespace: bytes
    tenant: str
    page_bytes: int

    def to_json(self) -> str:
        """Returns one line; equal records have equal lines."""
        return json.dumps([self.namespace.hex(), self.tenant, self.page_bytes])

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`. Raises `ProtocolError` for any other text."""
        with reading_record("layout"):
            name, tenant, page_bytes = record_fields(text)
            record = cls(bytes.fromhex(name), str(tenant), int(page_bytes))
        if len(record.namespace) != HASH_BYTES or not 0 < record.page_bytes <= PAGE_BYTES_MAX:
            raise ProtocolError("the directory's record of a layout is out of bounds")
        return record


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Page events of one node, packed (see `attnstore.directory.events`). `dropped` counts events that did not fit."""

    node_id: str
    packed: bytes
    dropped: int = 0


@contextmanager
def reading_record(kind: str) -> Iterator[None]:
    """Turns every error of parsing a record into `ProtocolError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ProtocolError(f"the directory holds a record that is no {kind}'s: {str(error)[:_REASON_CHARS]}") from None


def record_fields(text: str | bytes) -> Any:
    """Returns the fields of a JSON record. Raises `ValueError` if it is malformed or too long, or `RecursionError`."""
    if len(text) > RECORD_BYTES_MAX:
        raise ValueError(f"it has more than {RECORD_BYTES_MAX} bytes")
    return json.loads(text)


def is_name(text: str) -> bool:
    """Returns whether a node may have this name: names are shown in logs and tables, and hashed."""
    return 0 < len(text) <= NODE_ID_CHARS_MAX and text.isprintable()


def _is_node_url(url: str) -> bool:
    scheme, _, address = url.partition("://")
    try:
        port = Address.parse(address).port
    except InvalidArgument:
        return False
    return scheme in ("grpc", "grpcs") and len(url) <= NODE_URL_CHARS_MAX and port > 0
