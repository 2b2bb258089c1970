"""An attacker who can write anything into a cluster's directory gets no token and no page, and no record of his is believed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attnstore
from attnstore import errors
from attnstore.cluster_key import ClusterKey
from attnstore.directory import Member
from attnstore.limits import MEMBER_MS_MAX
from tests.cluster.conftest import PATIENCE_S, Cluster, hits_and_no_wrong_byte, known_to, stored
from tests.cluster.rogue_node import RogueNode
from tests.cluster.test_rogue_records import ROGUE, Rogue
from tests.samples import Batch, eventually

pytestmark = pytest.mark.redis

TOKENS = {"red": "t0ken-of-red", "blue": "t0ken-of-blue"}


class KeyedCluster:
    """Two tenants, tokens and a key; with TLS if there are certificates."""

    def __init__(self, folder: Path, certificates: Path | None) -> None:
        self.key = folder / "cluster.key"
        self.public = str(ClusterKey.create(self.key).public)
        tokens = folder / "tokens.toml"
        tokens.write_text("".join(f'{tenant} = "{token}"\n' for tenant, token in TOKENS.items()))
        options = ["--cluster-key", str(self.key), "--tokens-file", str(tokens)]
        self.tls_ca = None
        if certificates is not None:
            self.tls_ca = certificates / "cert.pem"
            options += ["--tls-cert", str(self.tls_ca), "--tls-key", str(certificates / "key.pem"), "--peer-ca", str(self.tls_ca)]
        self.cluster = Cluster(options=tuple(options))
        self.cluster.start("ada")
        self.cluster.start("bob")
        with self.connect("red") as client:
            assert eventually(lambda: known_to(client) == {"ada", "bob"}, PATIENCE_S)

    @property
    def url(self) -> str:
        return f"{self.cluster.url}?key={self.public}"

    def connect(self, tenant: str) -> attnstore.ClusterClient:
        client = attnstore.connect(self.url, token=TOKENS[tenant], tls_ca=self.tls_ca)
        assert isinstance(client, attnstore.ClusterClient)
        return client

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        tls = ["--tls-ca", str(self.tls_ca)] if self.tls_ca else []
        whole = [sys.executable, "-m", "attnstore.cli", *arguments, "--directory", self.url, *tls]
        return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(params=["plain", "tls"])
def keyed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyedCluster]:
    keyed = KeyedCluster(tmp_path, request.getfixturevalue("certificates") if request.param == "tls" else None)
    yield keyed
    keyed.cluster.close()


def test_a_rogue_that_owns_everything_in_the_directory_gets_no_token_no_page_and_no_reader(
    keyed: KeyedCluster, batch_of: Callable[..., Batch], certificates: Path
) -> None:
    tls = certificates if keyed.tls_ca else None
    with RogueNode(tls) as encrypted, RogueNode() as plain, Rogue(keyed.cluster) as rogue, keyed.connect("red") as client:
        batch = stored(client, batch_of(40))
        for node_id, node in (("rogue", encrypted), ("rogue1", plain)):
            rogue.register(node_id, json.dumps({**ROGUE, "node_id": node_id, "url": node.url, "weight": 1000.0}))
        for node_id in ("ada", "bob"):
            rogue.write("intents", node_id, "evict")
        rogue.write("quotas", "red", "0")
        time.sleep(MEMBER_MS_MAX / 1000)
        with keyed.connect("red") as fresh_client:
            fresh_client.register_layout(batch.namespace, batch.layout)
            for reader in (client, fresh_client):
                assert known_to(reader) == {"ada", "bob"}
                assert hits_and_no_wrong_byte(reader, batch) == len(batch.hashes)
            stored(fresh_client, batch_of(40, "later"))
        keyed.cluster.start("cleo")  # pages are handed over now
        assert eventually(lambda: known_to(client) == {"ada", "bob", "cleo"}, PATIENCE_S)
        time.sleep(MEMBER_MS_MAX / 1000)
        for node in (encrypted, plain):
            assert (node.asked, node.credentials, node.page_bytes) == ([], [], 0)


def test_a_rogue_where_a_member_was_is_challenged_and_gets_nothing(
    keyed: KeyedCluster, batch_of: Callable[..., Batch], certificates: Path
) -> None:
    """Like a server that has taken over a pod's address while the signed record of the pod is still valid."""
    key = ClusterKey.load(keyed.key)
    with RogueNode(certificates if keyed.tls_ca else None) as node, Rogue(keyed.cluster) as rogue, keyed.connect("red") as client:
        batch = stored(client, batch_of(40))
        member = Member("rogue", node.url, b"e" * 16, weight=1000.0)
        issued = time.time_ns() // 1_000_000
        signature = key.sign("node", "default", "rogue", issued, member.to_json())
        rogue.register("rogue", f"{member.to_json()}\n{issued}\n{signature}")
        assert eventually(lambda: "Describe" in node.asked and "rogue" in known_to(client), PATIENCE_S)
        assert hits_and_no_wrong_byte(client, batch) >= 0
        stored(client, batch_of(40, "later"))
        assert "has not shown" in keyed.command("status", "--token", TOKENS["red"]).stdout
        time.sleep(MEMBER_MS_MAX / 1000)
        assert (set(node.asked), node.credentials, node.page_bytes) == ({"Describe"}, [], 0)


def test_pages_of_every_tenant_are_handed_over_with_the_nodes_own_credential(
    keyed: KeyedCluster, batch_of: Callable[..., Batch]
) -> None:
    with keyed.connect("red") as red, keyed.connect("blue") as blue:
        batches = [stored(client, batch_of(150, tenant)) for tenant, client in (("red", red), ("blue", blue))]
        refused = keyed.command("drain", "bob")
        assert refused.returncode == 2
        assert "--cluster-key" in refused.stderr
        drained = keyed.command("drain", "bob", "--wait", "40", "--cluster-key", str(keyed.key))
        assert drained.returncode == 0, drained.stderr
        keyed.cluster.nodes.pop("bob").stop()
        for client, batch in zip((red, blue), batches, strict=True):
            assert hits_and_no_wrong_byte(client, batch) == len(batch.hashes)


def test_tokens_need_a_key_at_nodes_clients_and_operators() -> None:
    serve = [sys.executable, "-m", "attnstore.cli", "serve", "--directory", "redis://127.0.0.1:1", "--token", "t0ken"]
    ended = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--cluster-key" in ended.stderr
    with pytest.raises(errors.InvalidArgument, match="key=KEY"):
        attnstore.connect("redis://127.0.0.1:1", token="t0ken")
    status = [sys.executable, "-m", "attnstore.cli", "status", "--directory", "redis://127.0.0.1:1", "--token", "t0ken"]
    assert "--cluster-key" in subprocess.run(status, capture_output=True, text=True, timeout=60, check=False).stderr


def test_the_key_is_made_once_and_its_public_part_shown(tmp_path: Path) -> None:
    path, public = tmp_path / "cluster.key", tmp_path / "cluster.pub"
    command = [sys.executable, "-m", "attnstore.cli", "cluster-key", str(path), "--public", str(public)]
    shown = [subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout for _ in range(2)]
    assert shown == [f"{ClusterKey.load(path).public}\n"] * 2
    assert public.read_text() == shown[0]
