"""Authentication between nodes: proofs and credentials are valid for one purpose, one node and a short time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnstore.cluster_key import ClusterKey
from attnstore.directory import Member
from attnstore.directory.trust import MemberCheck
from attnstore.errors import Unauthenticated
from attnstore.limits import CLOCKS_APART_MS_MAX, CREDENTIAL_MS_MAX
from attnstore.peering import CREDENTIAL_PREFIX, Peering

ADA = Member("ada", "grpc://10.0.0.1:7400", b"a" * 16)
BOB = Member("bob", "grpc://10.0.0.2:7400", b"b" * 16)
CHALLENGE = bytes(range(32))
NOW_MS = 1_700_000_000_000
TENANTS = frozenset({"red", "blue"})


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> ClusterKey:
    return ClusterKey.create(tmp_path_factory.mktemp("keys") / "key")


def peering(key: ClusterKey, member: Member, now_ms: int = NOW_MS, cluster: str = "default") -> Peering:
    return Peering(key, cluster, member, TENANTS, lambda: now_ms)


def passed(key: ClusterKey, member: Member, challenge: bytes, proof: str, cluster: str = "default") -> bool:
    return MemberCheck(member, cluster, key.public).is_passed(challenge, proof)


def test_a_proof_is_good_for_one_challenge_of_one_node_where_its_record_says_it_is(key: ClusterKey) -> None:
    proof = peering(key, ADA).proof(CHALLENGE)
    assert passed(key, ADA, CHALLENGE, proof)
    for member in (BOB, replace(ADA, epoch=b"c" * 16), replace(ADA, url="grpc://10.0.0.9:7400")):
        assert not passed(key, member, CHALLENGE, proof)
    assert not passed(key, ADA, CHALLENGE, proof, "other")
    assert not passed(key, ADA, bytes(32), proof)
    assert not passed(key, ADA, CHALLENGE, "")


def test_a_credential_lets_a_node_act_as_a_tenant_at_one_other_node_for_a_while(key: ClusterKey, tmp_path: Path) -> None:
    credential = peering(key, ADA).credential(BOB, "red")
    assert peering(key, BOB).tenant_of(credential) == "red"
    foreign = ClusterKey.create(tmp_path / "key")
    for refused in (
        peering(key, ADA),
        peering(key, replace(BOB, epoch=b"c" * 16)),
        peering(key, BOB, cluster="other"),
        peering(key, BOB, NOW_MS + CREDENTIAL_MS_MAX + CLOCKS_APART_MS_MAX),
        peering(key, BOB, NOW_MS - CLOCKS_APART_MS_MAX - 1),
        peering(foreign, BOB),
        Peering(key, "default", BOB, frozenset({"blue"}), lambda: NOW_MS),
    ):
        with pytest.raises(Unauthenticated):
            refused.tenant_of(credential)


@pytest.mark.parametrize("claims", ["", "zz", b"{}".hex(), b'["a", "red"]'.hex(), b'["a", "red", 1e999]'.hex(), b"[".hex() * 5_000])
def test_what_is_no_credential_is_refused(key: ClusterKey, claims: str) -> None:
    with pytest.raises(Unauthenticated):
        peering(key, BOB).tenant_of(f"{CREDENTIAL_PREFIX}{claims}.{'A' * 86}")


def test_nobody_makes_a_credential_of_a_proof(key: ClusterKey) -> None:
    forged = peering(key, ADA).credential(BOB, "red").rpartition(".")[0] + "." + peering(key, BOB).proof(CHALLENGE)
    with pytest.raises(Unauthenticated):
        peering(key, BOB).tenant_of(forged)
