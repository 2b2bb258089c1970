"""Authentication between the nodes of a cluster: a challenge that only a member can answer, and a node's credential.

Owns: the proof of membership and the credential of a node, both made with the cluster's key. Invariants: a proof is valid for one
challenge, one incarnation of one node and its URL; a credential is valid for one incarnation of the receiving node, one tenant and
`CREDENTIAL_MS_MAX`. A server that takes over the address of a member therefore receives neither a page nor a credential that
another node accepts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from attnstore.directory import Member
from attnstore.directory.trust import MemberCheck, identity_fields, wall_clock_ms
from attnstore.errors import Unauthenticated
from attnstore.limits import CLOCKS_APART_MS_MAX, CREDENTIAL_BYTES_MAX, CREDENTIAL_MS_MAX

if TYPE_CHECKING:  # its package is an optional dependency
    from attnstore.cluster_key import ClusterKey

CREDENTIAL_PREFIX: Final = "attnstore-node."


@dataclass(frozen=True, slots=True)
class Peering:
    """A node's side: `member` is its own record, `tenants` are those that it knows."""

    key: ClusterKey
    cluster: str
    member: Member
    tenants: frozenset[str]
    now_ms: Callable[[], int] = wall_clock_ms

    def proof(self, challenge: bytes) -> str:
        """Returns the proof that this node is the one in its record."""
        return self.key.sign("proof", *identity_fields(self.cluster, self.member), challenge.hex())

    def credential(self, of: Member, tenant: str) -> str:
        """Returns a bearer token with which this node acts as a tenant at another node that has shown its proof."""
        until_ms = self.now_ms() + CREDENTIAL_MS_MAX
        signature = self.key.sign("credential", *identity_fields(self.cluster, of), self.member.node_id, tenant, until_ms)
        claims = json.dumps([self.member.node_id, tenant, until_ms]).encode().hex()
        return f"{CREDENTIAL_PREFIX}{claims}.{signature}"

    def check_of(self, member: Member) -> MemberCheck:
        """Returns the check that another node must pass before anything is sent to it."""
        return MemberCheck(member, self.cluster, self.key.public)

    def tenant_of(self, credential: str) -> str:
        """Returns the tenant as which the holder of a credential acts. Raises `Unauthenticated`."""
        claims, _, signature = credential.removeprefix(CREDENTIAL_PREFIX).partition(".")
        try:
            if len(claims) > 2 * CREDENTIAL_BYTES_MAX:
                raise ValueError("too long")
            issuer, tenant, until_ms = json.loads(bytes.fromhex(claims))
            fields = (str(issuer), str(tenant), int(until_ms))
        except (ArithmeticError, RecursionError, TypeError, ValueError):
            raise Unauthenticated("the credential of a node cannot be read") from None
        if not self.key.public.has_signed(signature, "credential", *identity_fields(self.cluster, self.member), *fields):
            raise Unauthenticated("the credential is not that of a node of this cluster, for this node since its start")
        if not 0 < fields[2] - self.now_ms() + CLOCKS_APART_MS_MAX <= CREDENTIAL_MS_MAX + 2 * CLOCKS_APART_MS_MAX:
            raise Unauthenticated("the credential of the node has expired, or the clocks of both are too far apart")
        if fields[1] not in self.tenants:
            raise Unauthenticated("the tenant of the credential is not one of this node's")
        return fields[1]
