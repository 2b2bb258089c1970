"""A deleted page does not return: not from a stand-in, a replica that hung, or a node that was away."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import attnstore
from attnstore import PageStatus
from attnstore.limits import MEMBER_MS_MAX, SEGMENT_BLOCKS
from tests.cluster.conftest import Cluster, hits_and_no_wrong_byte, known_to, stored
from tests.samples import Batch, eventually

pytestmark = pytest.mark.redis

BatchOf = Callable[..., Batch]
PAGES = 12 * SEGMENT_BLOCKS


def left_on(cluster: Cluster, name: str, batch: Batch) -> int:
    """Returns how many pages of the batch a node has."""
    with attnstore.connect(cluster.nodes[name].url) as client:
        client.register_layout(batch.namespace, batch.layout)
        return sum(client.match(batch.namespace, [[page_hash] for page_hash in batch.hashes]).hits)


def is_gone(cluster: Cluster, client: attnstore.ClusterClient, batch: Batch) -> bool:
    return (
        not hits_and_no_wrong_byte(client, batch)
        and client.match(batch.namespace, [batch.hashes]).hits == (0,)
        and not any(left_on(cluster, name, batch) for name in cluster.nodes)
    )


def test_a_copy_on_a_node_that_is_no_owner_is_deleted_too(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = batch_of(PAGES)
        for node in cluster.nodes.values():  # as on stand-ins, of any rank
            with attnstore.connect(node.url) as direct:
                direct.register_layout(batch.namespace, batch.layout)
                direct.write(batch.namespace, batch.hashes, batch.pages)
        client.register_layout(batch.namespace, batch.layout)
        deleted = client.delete(batch.namespace, batch.hashes)
        assert set(deleted) == {PageStatus.OK}
        assert deleted.unreached == ()
        assert is_gone(cluster, client, batch)
        again = client.write(batch.namespace, batch.hashes, batch.pages)
        assert set(again.verdicts) == {PageStatus.STORED}
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_node_that_hung_is_named_to_the_caller_and_told_when_it_is_back(replicated: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(replicated.url) as client:
        batch = stored(client, batch_of(PAGES))
        replicated.nodes["cleo"].suspend()
        try:
            deleted = client.delete(batch.namespace, batch.hashes, deadline_ms=1_000)
            assert deleted.unreached == ("cleo",)
            assert set(deleted) == {PageStatus.OK}
        finally:
            replicated.nodes["cleo"].resume()
        assert eventually(lambda: not left_on(replicated, "cleo", batch), 20)
        assert is_gone(replicated, client, batch)
        written = client.write(batch.namespace, batch.hashes[:8], batch.pages[:8])
        assert all(verdict.is_kept for verdict in written.verdicts)


def test_a_node_that_was_no_member_any_more_is_told_before_it_hands_anything_over(replicated: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(replicated.url) as client:
        batch = stored(client, batch_of(PAGES))
        replicated.nodes["cleo"].suspend()
        try:
            assert eventually(lambda: known_to(client) == {"ada", "bob"}, 20)
            deleted = client.delete(batch.namespace, batch.hashes)
            assert deleted.unreached == ()
            assert not left_on(replicated, "ada", batch)
        finally:
            replicated.nodes["cleo"].resume()
        assert eventually(lambda: not left_on(replicated, "cleo", batch), 20)
        assert eventually(lambda: known_to(client) == {"ada", "bob", "cleo"}, 20)
        time.sleep(MEMBER_MS_MAX / 1000)  # as long as a hand-over after the change takes
        assert is_gone(replicated, client, batch)
