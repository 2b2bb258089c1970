"""The cluster client over many nodes: placement, leases, layers, joining, draining and losing nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import attnstore
from attnstore import PageStatus, errors
from attnstore.cluster_key import ClusterKey
from attnstore.limits import SEGMENT_BLOCKS
from tests.cluster.conftest import Cluster, hits_and_no_wrong_byte, known_to, run_command, status_of, stored
from tests.samples import Batch, deleted_after_reading, eventually

pytestmark = pytest.mark.redis

BatchOf = Callable[..., Batch]
PAGES = 12 * SEGMENT_BLOCKS


def sealed_on(cluster: Cluster, name: str) -> int:
    with attnstore.connect(cluster.nodes[name].url) as client:
        return client.stats().pages_sealed


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm", "auto"])
def test_pages_lie_on_all_nodes_and_are_read_as_they_were_written(
    shared_cluster: Cluster, batch_of: BatchOf, transport: str
) -> None:
    with attnstore.connect(shared_cluster.url, transport=transport) as client:
        before = [sealed_on(shared_cluster, name) for name in shared_cluster.nodes]
        batch = stored(client, batch_of(PAGES))
        after = [sealed_on(shared_cluster, name) for name in shared_cluster.nodes]
        assert all(now > then for now, then in zip(after, before, strict=True))
        assert sum(after) - sum(before) == PAGES
        assert client.match(batch.namespace, [batch.hashes, batch.hashes[100:]]).hits == (PAGES, PAGES - 100)
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        again = client.write(batch.namespace, batch.hashes, batch.pages)
        assert set(again.verdicts) == {PageStatus.ALREADY_PRESENT}


def test_a_list_of_nodes_is_a_cluster_without_a_directory(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    target = "grpc://" + ",".join(node.address for node in shared_cluster.nodes.values())
    with attnstore.connect(target) as client, attnstore.connect(target) as other:
        batch = stored(client, batch_of(PAGES))
        other.register_layout(batch.namespace, batch.layout)
        assert hits_and_no_wrong_byte(other, batch) == PAGES


def test_a_match_ends_at_the_first_page_that_no_node_has(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        gap = 5 * SEGMENT_BLOCKS + 7
        assert client.delete(batch.namespace, batch.hashes[gap : gap + 1]) == (PageStatus.OK,)
        found = client.match(batch.namespace, [batch.hashes, batch.hashes[gap + 1 :]])
        assert found.hits == (gap, PAGES - gap - 1)
        assert client.delete(batch.namespace, batch.hashes[gap : gap + 1]) == (PageStatus.MISSING,)


def test_a_lease_holds_its_pages_on_every_node_until_it_is_released(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        found = client.match(batch.namespace, [batch.hashes], lease_ms=60_000)
        assert found.lease is not None
        assert set(client.delete(batch.namespace, batch.hashes)) == {PageStatus.PINNED}
        assert client.renew(found.lease, 70_000).lease_ms == 70_000
        assert client.release(found.lease)
        assert not client.release(found.lease)
        with pytest.raises(errors.LeaseExpired):
            client.renew(found.lease, 1_000)
        late = client.read(batch.namespace, batch.hashes, batch.buffers(), lease=found.lease)
        assert set(late.statuses) == {PageStatus.LEASE_EXPIRED}
        assert set(client.delete(batch.namespace, batch.hashes)) == {PageStatus.OK}


def test_nothing_stays_leased_where_the_first_page_is_missing(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        client.delete(batch.namespace, batch.hashes[:1])
        found = client.match(batch.namespace, [batch.hashes], lease_ms=60_000)
        assert (found.hits, found.lease) == ((0,), None)
        assert eventually(lambda: client.stats().leases == 0)


def test_layers_of_all_nodes_are_told_of_in_order_as_those_of_one_read(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url, transport="tcp") as client:
        batch = stored(client, batch_of(PAGES))
        told: list[tuple[int, int]] = []
        buffers = batch.buffers()
        result = client.read(batch.namespace, batch.hashes, buffers, on_layer=lambda layer, pages: told.append((layer, pages)))
        assert told == [(layer, PAGES) for layer in range(batch.layout.layers)]
        assert buffers == batch.pages
        assert result.transport == "tcp"


def test_layers_are_told_of_up_to_the_first_page_that_is_missing(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url, transport="tcp") as client:
        batch = stored(client, batch_of(PAGES))
        client.delete(batch.namespace, batch.hashes[300:301])
        told: list[tuple[int, int]] = []
        result = client.read(
            batch.namespace, batch.hashes, batch.buffers(), on_layer=lambda layer, pages: told.append((layer, pages))
        )
        assert result.leading_hits == 300
        assert [layer for layer, _ in told] == list(range(batch.layout.layers))
        assert all(pages <= 300 for _, pages in told[-1:])


def test_callers_that_look_for_the_same_pages_at_once_ask_the_nodes_once(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    callers = 16
    with attnstore.connect(shared_cluster.url) as client, ThreadPoolExecutor(callers) as pool:
        batch = batch_of(PAGES)
        client.register_layout(batch.namespace, batch.layout)
        before = client.stats().missed_pages
        together = threading.Barrier(callers)

        def look(_number: int) -> tuple[int, ...]:
            together.wait()
            return client.match(batch.namespace, [batch.hashes]).hits

        assert set(pool.map(look, range(callers))) == {(0,)}
        # Threads that are too late for the first flight share the next one; without sharing there would be `callers` times as many.
        assert client.stats().missed_pages - before <= PAGES * callers // 2


def test_callers_that_share_a_match_share_its_lease_until_the_last_one_releases_it(
    shared_cluster: Cluster, batch_of: BatchOf
) -> None:
    callers = 8
    with attnstore.connect(shared_cluster.url) as client, ThreadPoolExecutor(callers) as pool:
        batch = stored(client, batch_of(2 * SEGMENT_BLOCKS))
        found = list(pool.map(lambda _n: client.match(batch.namespace, [batch.hashes], lease_ms=60_000), range(callers)))
        leases = [result.lease for result in found if result.lease is not None]
        assert len(leases) == callers
        for lease in leases[:-1]:
            client.release(lease)
        assert PageStatus.OK not in client.delete(batch.namespace, batch.hashes)
        assert client.release(leases[-1])
        assert set(client.delete(batch.namespace, batch.hashes)) == {PageStatus.OK}


def test_a_wrong_call_is_refused_before_anything_is_sent(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = batch_of(4)
        with pytest.raises(errors.NamespaceUnknown):
            client.match(batch.namespace, [batch.hashes])
        client.register_layout(batch.namespace, batch.layout)
        with pytest.raises(errors.BufferMismatch):
            client.read(batch.namespace, batch.hashes, batch.buffers()[:-1])
        with pytest.raises(errors.InvalidArgument):
            client.match(batch.namespace, [[b"short"]])
        with pytest.raises(errors.InvalidArgument):
            client.write(batch.namespace, batch.hashes, batch.pages[:-1])
        wrong = attnstore.PageLayout(layers=3, kv_heads=1, head_dim=8, dtype=attnstore.DType.FP32)
        with pytest.raises(errors.LayoutMismatch):
            client.register_layout(batch.namespace, wrong)
    with pytest.raises(errors.ClientClosed):
        client.match(batch.namespace, [batch.hashes])


def test_a_node_that_joins_costs_no_hit_and_gets_its_share(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        cluster.start("dora")
        while known_to(client) != {"ada", "bob", "cleo", "dora"}:
            assert hits_and_no_wrong_byte(client, batch) == PAGES
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        assert eventually(lambda: sealed_on(cluster, "dora") >= SEGMENT_BLOCKS)
    # A client that never saw the old placement finds the moved pages once they have been handed over.
    with attnstore.connect(cluster.url) as fresh_client:
        fresh_client.register_layout(batch.namespace, batch.layout)
        assert eventually(lambda: hits_and_no_wrong_byte(fresh_client, batch) == PAGES)


def test_a_node_is_drained_stopped_and_taken_back_without_losing_a_hit(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        drained = run_command("drain", "bob", "--wait", "30", "--directory", cluster.url)
        assert drained.returncode == 0, drained.stderr
        states = {name: node["state"] for name, node in status_of(cluster).items()}
        assert states == {"ada": "active", "bob": "drained", "cleo": "active"}
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        assert run_command("undrain", "bob", "--directory", cluster.url).returncode == 0
        assert eventually(lambda: status_of(cluster)["bob"]["state"] == "active")
        assert run_command("drain", "bob", "--wait", "30", "--directory", cluster.url).returncode == 0
        cluster.nodes.pop("bob").stop()
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        cluster.start("bob")
        cluster.wait_for("ada", "bob", "cleo")
        assert eventually(lambda: sealed_on(cluster, "bob") >= SEGMENT_BLOCKS)
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_drain_to_a_smaller_node_ends_costs_it_no_page_of_its_own_and_says_what_was_left(batch_of: BatchOf) -> None:
    cluster = Cluster("ada")
    try:
        cluster.start("bob", "--capacity", "4MiB")
        cluster.wait_for("ada", "bob")
        with attnstore.connect(cluster.url) as client:
            weights = {member.node_id: member.weight for member in client.members()}
            assert weights["ada"] == 16 * weights["bob"]
            batch = stored(client, batch_of(100 * SEGMENT_BLOCKS))
            own = pages_on(cluster, "bob", batch)
            assert 0 < len(own) < len(batch.hashes) / 4
            drained = run_command("drain", "ada", "--wait", "60", "--directory", cluster.url)
            assert drained.returncode == 1
            room = (4 << 20) // batch.layout.page_bytes - len(own)
            left = len(batch.hashes) - len(own) - room
            assert f"ada is drained, but {left} of its pages found no room" in drained.stderr
            assert set(own) <= set(pages_on(cluster, "bob", batch))
            assert sealed_on(cluster, "bob") == len(own) + room
            assert hits_and_no_wrong_byte(client, batch) == len(batch.hashes)
    finally:
        cluster.close()


def test_an_evicted_node_is_asked_nothing_any_more(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        on_bob = sealed_on(cluster, "bob")
        assert run_command("evict", "bob", "--directory", cluster.url).returncode == 0
        assert eventually(lambda: known_to(client) == {"ada", "cleo"})
        assert hits_and_no_wrong_byte(client, batch) == PAGES - on_bob
        assert run_command("undrain", "bob", "--directory", cluster.url).returncode == 0
        assert eventually(lambda: known_to(client) == {"ada", "bob", "cleo"})
        assert hits_and_no_wrong_byte(client, batch) == PAGES


@pytest.mark.parametrize("command", ["drain", "undrain", "evict"])
def test_operators_are_told_of_a_node_that_is_none(shared_cluster: Cluster, command: str) -> None:
    refused = run_command(command, "nobody", "--directory", shared_cluster.url)
    assert refused.returncode == 2
    assert "no node of this cluster" in refused.stderr


@pytest.mark.parametrize("victim", ["ada", "bob", "cleo"])
def test_with_two_copies_killing_any_one_node_loses_no_page(replicated: Cluster, batch_of: BatchOf, victim: str) -> None:
    with attnstore.connect(replicated.url) as client:
        batch = stored(client, batch_of(PAGES))
        assert sum(sealed_on(replicated, name) for name in replicated.nodes) == 2 * PAGES
        replicated.kill(victim)
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        assert client.match(batch.namespace, [batch.hashes]).hits == (PAGES,)
        # The remaining nodes make second copies, so that another loss costs nothing.
        survivors = list(replicated.nodes)
        assert eventually(lambda: [sealed_on(replicated, name) for name in survivors] == [PAGES, PAGES], 20)
        replicated.kill(survivors[0])
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_node_that_comes_back_empty_is_given_its_copies_again(replicated: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(replicated.url) as client:
        batch = stored(client, batch_of(PAGES))
        share = sealed_on(replicated, "bob")
        replicated.kill("bob")
        replicated.start("bob")
        assert eventually(lambda: sealed_on(replicated, "bob") == share, 20)
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_tenant_keeps_no_more_on_all_nodes_together_than_its_quota(cluster: Cluster, batch_of: BatchOf) -> None:
    quota = run_command("quota", "default", str(90 * 4096), "--directory", cluster.url)
    assert quota.returncode == 0, quota.stderr
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))

        def is_enforced() -> bool:
            # A tenant loses pages when it writes new ones.
            client.delete(batch.namespace, batch.hashes[::2])
            client.write(batch.namespace, batch.hashes, batch.pages)
            return client.stats().used_bytes <= 90 * 4096

        assert eventually(is_enforced)
        assert 0 < hits_and_no_wrong_byte(client, batch) <= 90
        assert run_command("quota", "default", "none", "--directory", cluster.url).returncode == 0

        def is_lifted() -> bool:
            client.write(batch.namespace, batch.hashes, batch.pages)
            return hits_and_no_wrong_byte(client, batch) == PAGES

        assert eventually(is_lifted)


def test_nodes_that_ask_for_tokens_hand_pages_over_as_their_tenant(batch_of: BatchOf, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('red = "r3d"\nblue = "blu3"\n')
    key = tmp_path / "cluster.key"
    query = f"?key={ClusterKey.create(key).public}"
    cluster = Cluster("ada", "bob", options=("--tokens-file", str(tokens), "--cluster-key", str(key)))
    try:
        url = cluster.url + query
        with attnstore.connect(url, token="r3d") as red, attnstore.connect(url, token="blu3") as blue:
            reds = stored(red, batch_of(PAGES))
            # The same model and prompt: a tenant must never read what the other one stores.
            blues = stored(blue, replace(reds, pages=[bytes(reversed(page)) for page in reds.pages]))
            access = ("--directory", cluster.url, "--token", "r3d", "--cluster-key", str(key))
            drained = run_command("drain", "bob", "--wait", "30", *access)
            assert drained.returncode == 0, drained.stderr
            cluster.nodes.pop("bob").stop()
            assert hits_and_no_wrong_byte(red, reds) == hits_and_no_wrong_byte(blue, blues) == PAGES
        with attnstore.connect(url, token="wr0ng") as stranger, pytest.raises(errors.Unauthenticated):
            stranger.describe()
    finally:
        cluster.close()


def test_pages_that_are_named_twice_are_answered_twice_and_given_back(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = stored(client, batch_of(2 * SEGMENT_BLOCKS))
        run = [*batch.hashes[:2], batch.hashes[0], *batch.hashes[SEGMENT_BLOCKS : SEGMENT_BLOCKS + 2] * 2]
        pages = [batch.pages[batch.hashes.index(page_hash)] for page_hash in run]
        found = client.match(batch.namespace, [run, run], lease_ms=60_000)
        assert found.hits == (len(run),) * 2
        assert found.lease is not None
        buffers = [bytearray(batch.layout.page_bytes) for _ in run]
        assert client.read(batch.namespace, run, buffers, lease=found.lease).leading_hits == len(run)
        assert buffers == pages
        assert set(client.write(batch.namespace, run, pages).verdicts) == {PageStatus.ALREADY_PRESENT}
        assert client.release(found.lease)
        assert eventually(lambda: client.stats().pages_pinned == 0)
        assert set(client.delete(batch.namespace, run)) <= {PageStatus.OK, PageStatus.MISSING}
        assert client.match(batch.namespace, [run]).hits == (0,)


def test_whoever_watches_a_namespace_is_told_of_the_pages_of_all_nodes(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(shared_cluster.url) as client:
        batch = batch_of(PAGES)
        client.register_layout(batch.namespace, batch.layout)
        events = client.watch(batch.namespace, deadline_ms=20_000)
        client.write(batch.namespace, batch.hashes, batch.pages)
        told = {next(events).hash for _ in range(PAGES)}
        assert told == set(batch.hashes)
        client.delete(batch.namespace, batch.hashes[:1])
        assert next(events).kind is attnstore.PageEventKind.DELETED


def test_a_watcher_is_told_of_its_own_tenants_pages_alone(batch_of: BatchOf, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('red = "r3d"\nblue = "blu3"\n')
    key = tmp_path / "cluster.key"
    query = f"?key={ClusterKey.create(key).public}"
    cluster = Cluster("ada", options=("--tokens-file", str(tokens), "--cluster-key", str(key)))
    try:
        url = cluster.url + query
        with attnstore.connect(url, token="r3d") as red, attnstore.connect(url, token="blu3") as blue:
            batch = batch_of(2)
            for client in (red, blue):
                client.register_layout(batch.namespace, batch.layout)
            events = blue.watch(batch.namespace, deadline_ms=20_000)
            stored(red, batch)
            blue.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
            blue.delete(batch.namespace, batch.hashes[:1])
            assert [(event.kind.name, event.hash) for event in (next(events), next(events))] == [
                ("SEALED", batch.hashes[0]),
                ("DELETED", batch.hashes[0]),
            ]
    finally:
        cluster.close()


def test_a_fixed_list_of_nodes_cannot_be_watched(shared_cluster: Cluster, batch_of: BatchOf) -> None:
    target = "grpc://" + ",".join(node.address for node in shared_cluster.nodes.values())
    with attnstore.connect(target) as client, pytest.raises(errors.InvalidArgument, match="no directory"):
        client.watch(batch_of(1).namespace)


def test_a_segment_that_many_use_gets_a_second_copy_and_survives_its_node(batch_of: BatchOf) -> None:
    cluster = Cluster("ada", "bob", "cleo", options=("--hot-uses", "5"))
    try:
        with attnstore.connect(cluster.url) as client:
            hot, cold = stored(client, batch_of(SEGMENT_BLOCKS, "hot")), stored(client, batch_of(SEGMENT_BLOCKS, "cold"))
            (first,) = (name for name in cluster.nodes if has(cluster, name, hot))
            kept_on = [name for name in cluster.nodes if has(cluster, name, cold)]

            def use() -> list[str]:
                found = client.match(hot.namespace, [hot.hashes], lease_ms=5_000)
                assert found.hits == (SEGMENT_BLOCKS,)
                assert hits_and_no_wrong_byte(client, hot) == SEGMENT_BLOCKS
                assert found.lease is not None
                client.release(found.lease)
                return [name for name in cluster.nodes if has(cluster, name, hot)]

            assert eventually(lambda: len(use()) == 2, 20), "no second copy was made"
            assert [name for name in cluster.nodes if has(cluster, name, cold)] == kept_on
            assert sum(node["hot_segments"] for node in status_of(cluster).values()) > 0
            cluster.kill(first)
            assert eventually(lambda: hits_and_no_wrong_byte(client, hot) == SEGMENT_BLOCKS, 20)
            assert eventually(lambda: known_to(client) == set(cluster.nodes), 20)
            assert set(deleted_after_reading(client, hot.namespace, hot.hashes)) == {PageStatus.OK}
            assert not any(has(cluster, name, hot) for name in cluster.nodes)
    finally:
        cluster.close()


def pages_on(cluster: Cluster, name: str, batch: Batch) -> list[bytes]:
    """Returns the pages of the batch that a node has."""
    with attnstore.connect(cluster.nodes[name].url) as client:
        client.register_layout(batch.namespace, batch.layout)
        hits = client.match(batch.namespace, [[page_hash] for page_hash in batch.hashes]).hits
        return [page_hash for page_hash, hit in zip(batch.hashes, hits, strict=True) if hit]


def has(cluster: Cluster, name: str, batch: Batch) -> bool:
    """Returns whether the node has all pages of the batch."""
    with attnstore.connect(cluster.nodes[name].url) as client:
        client.register_layout(batch.namespace, batch.layout)
        return client.match(batch.namespace, [batch.hashes]).hits == (len(batch.hashes),)
