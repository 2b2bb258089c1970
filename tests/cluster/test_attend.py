"""Attending in a real cluster: placement decides which node is asked, over the connections that the client has."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attnstore
from attnstore.address import Address
from attnstore.client.transports.grpc import GrpcTransport
from tests.cluster.conftest import Cluster, stored
from tests.samples import Batch

pytestmark = pytest.mark.redis

NAMES = ("ada", "bob", "cleo", "dora")
SEGMENTS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(*NAMES, options=("--attend-threads", "1"))
    yield cluster
    cluster.close()


def looked_up(cluster: Cluster) -> dict[str, int]:
    """How many pages each node has looked up since its start."""
    counts = {}
    for name, node in cluster.nodes.items():
        with attnstore.connect(node.url) as client:
            statistics = client.stats()
            counts[name] = statistics.hit_pages + statistics.missed_pages
    return counts


def test_a_node_that_owns_nothing_of_a_prefix_is_asked_nothing(cluster: Cluster, batch_of: Callable[..., Batch]) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(8))
        before = looked_up(cluster)
        with client.attention(batch.namespace, q_heads=4, scale=0.5) as attention:
            prefix = attention.open(batch.hashes)
            assert prefix is not None
            assert [each.pages for each in prefix.sets] == [8], "one segment, one owner"
        after = looked_up(cluster)
    asked = {name: after[name] - before[name] for name in NAMES if after[name] != before[name]}
    assert list(asked.values()) == [8]


def test_every_owner_is_asked_for_its_own_segments_alone(cluster: Cluster, batch_of: Callable[..., Batch]) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(SEGMENTS * 64))
        before = looked_up(cluster)
        with client.attention(batch.namespace, q_heads=4, scale=0.5) as attention:
            prefix = attention.open(batch.hashes)
            assert prefix is not None
            assert prefix.blocks == len(batch.hashes)
            shares = sorted(each.pages for each in prefix.sets)
        after = looked_up(cluster)
    assert sorted(after[name] - before[name] for name in NAMES if after[name] != before[name]) == shares
    assert len(shares) > 1


def test_a_cluster_is_attended_to_over_one_connection_of_each_kind_for_each_node(
    cluster: Cluster, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    with attnstore.connect(cluster.url) as writer:
        batch = stored(writer, batch_of(SEGMENTS * 64))
    opened: Counter[str] = Counter()
    channels: Counter[Address] = Counter()
    connect, begin = Address.connect, GrpcTransport.__init__

    def counted_connect(self: Address, *args: Any, **kwargs: Any) -> socket.socket:
        channels[self] += 1
        return connect(self, *args, **kwargs)

    def counted_begin(self: GrpcTransport, target: Any, *args: Any) -> None:
        opened[str(target)] += 1
        begin(self, target, *args)

    monkeypatch.setattr(Address, "connect", counted_connect)
    monkeypatch.setattr(GrpcTransport, "__init__", counted_begin)
    with attnstore.connect(cluster.url, transport="tcp") as client:
        client.register_layout(batch.namespace, batch.layout)
        with client.attention(batch.namespace, q_heads=4, scale=0.5) as attention:
            prefixes = [attention.open(batch.hashes), attention.open(batch.hashes)]
            nodes = {each.stream for prefix in prefixes if prefix is not None for each in prefix.sets}
    assert len(opened) == len(NAMES)
    assert set(opened.values()) == {1}
    assert len(nodes) > 1
    assert sorted(channels.values()) == [1] * len(nodes)
