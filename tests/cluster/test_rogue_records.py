"""Records in the directory of a running cluster that no node wrote: they are skipped and counted, and everything else continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Self

import pytest

import attnstore
from attnstore.directory import NodeState
from attnstore.limits import CAPACITY_BYTES_MAX, MEMBER_MS_MAX
from tests.cluster.conftest import PATIENCE_S, Cluster, hits_and_no_wrong_byte, known_to, stored
from tests.samples import Batch, eventually

pytestmark = pytest.mark.redis

ROGUE = {"node_id": "rogue", "url": "grpc://127.0.0.1:1", "epoch": "", "weight": 1.0, "replicas": 1, "state": "active", "hot": []}
RECORDS: dict[str, str | bytes] = {
    "infinite": json.dumps({**ROGUE, "replicas": "R"}).replace('"R"', "1e999"),
    "protocol": json.dumps({**ROGUE, "url": "http://127.0.0.1:1"}),
    "state": json.dumps({**ROGUE, "state": "hibernating"}),
    "text": b"\xff\xfe{",
    "nested": "[" * 100_000,
    "name": json.dumps({**ROGUE, "node_id": "ada"}),
}
ROGUE_IDS = ("rogue", "rogue1", "rogue2", "rogue3", "rogue4", "rogue5")
BAD_EVENTS: list[dict[str | bytes, str | bytes]] = [
    {"node": b"\xff", "packed": b"", "dropped": "0"},
    {"node": "ada", "packed": b"odd", "dropped": "0"},
    {"node": "ada", "packed": b"", "dropped": "many"},
    {"x": "y"},
]


class Rogue:
    """Writes arbitrary records into a cluster's directory, and removes them at the end."""

    def __init__(self, cluster: Cluster) -> None:
        self._client = cluster.directory.client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("intents", "quotas"):
            self._client.delete(self._key(name))
        for node_id in ROGUE_IDS:
            self._client.hdel(self._key("nodes"), node_id)
            self._client.zrem(self._key("alive"), node_id)
        self._everybody_looks()

    def register(self, node_id: str, record: str | bytes) -> None:
        """Registers a member that never expires."""
        self.register_all({node_id: record})

    def register_all(self, records: dict[str, str | bytes]) -> None:
        """Registers members that never expire, all at once."""
        self._client.zadd(self._key("alive"), dict.fromkeys(records, 1e15))
        self._client.hset(self._key("nodes"), mapping=records)
        self._everybody_looks()

    def write(self, name: str, field: str | bytes, value: str | bytes) -> None:
        """Writes a field of a hash."""
        self._client.hset(self._key(name), field, value)
        self._everybody_looks()

    def publish(self, entry: dict[str | bytes, str | bytes]) -> None:
        """Publishes an entry of the stream of events."""
        self._client.xadd(self._key("events"), entry)

    def _everybody_looks(self) -> None:
        self._client.hincrby(self._key("revision"), "number", 1)

    def _key(self, name: str) -> str:
        return f"{{attnstore:default}}:{name}"


def test_bad_records_of_nodes_are_skipped_and_the_cluster_goes_on(shared_cluster: Cluster, batch_of: Callable[..., Batch]) -> None:
    with Rogue(shared_cluster) as rogue, attnstore.connect(shared_cluster.url) as before:
        batch = stored(before, batch_of(20))
        rogue.register_all(dict(zip(ROGUE_IDS, RECORDS.values(), strict=True)))
        time.sleep(2 * MEMBER_MS_MAX / 1000)  # a node without a heartbeat for half of it is removed
        with attnstore.connect(shared_cluster.url) as after:
            after.register_layout(batch.namespace, batch.layout)
            for client in (before, after):
                assert known_to(client) == set(shared_cluster.nodes)
                assert hits_and_no_wrong_byte(client, batch) == len(batch.hashes)
        for node in shared_cluster.nodes.values():
            [line] = [line for line in node.log.splitlines() if "records of the directory are skipped" in line]
            assert f"records={len(RECORDS)}" in line, "each is counted, in one line"


def test_with_all_of_them_there_nodes_join_and_leave_and_what_is_good_is_followed(
    cluster: Cluster, batch_of: Callable[..., Batch]
) -> None:
    with Rogue(cluster) as rogue, attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(20))
        for node_id, record in zip(ROGUE_IDS, RECORDS.values(), strict=True):
            rogue.register(node_id, record)
        for name, field, value in (
            ("intents", "bob", "explode"),
            ("intents", b"\xff", "drain"),
            ("intents", "cleo", "drain"),
            ("quotas", "tenant", "9" * 5_000),
            ("quotas", "tenant2", str(CAPACITY_BYTES_MAX << 400)),
            ("quotas", b"\xff", "7"),
        ):
            rogue.write(name, field, value)
        cluster.start("dora")
        assert eventually(lambda: known_to(client) == {"ada", "bob", "cleo", "dora"}, PATIENCE_S)
        assert eventually(lambda: _states(client)["cleo"] is NodeState.DRAINED, PATIENCE_S)
        cluster.nodes.pop("ada").stop()
        assert eventually(lambda: known_to(client) == {"bob", "cleo", "dora"}, PATIENCE_S)
        assert hits_and_no_wrong_byte(client, batch) >= 0


def test_bad_events_are_skipped_and_the_watch_goes_on(shared_cluster: Cluster, batch_of: Callable[..., Batch]) -> None:
    with Rogue(shared_cluster) as rogue, attnstore.connect(shared_cluster.url) as client:
        first, second = batch_of(2, "first"), batch_of(2)
        for batch in (first, second):
            client.register_layout(batch.namespace, batch.layout)
        events = client.watch(second.namespace, deadline_ms=PATIENCE_S * 1e3)
        for entry in BAD_EVENTS:
            rogue.publish(entry)
        stored(client, second)
        assert next(events).hash in second.hashes


def _states(client: attnstore.ClusterClient) -> dict[str, NodeState]:
    return {member.node_id: member.state for member in client.members()}
