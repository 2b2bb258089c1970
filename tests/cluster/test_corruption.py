"""A page that changed in a node's memory is never handed over as valid, and a cluster's client recovers from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attnstore
from attnstore import PageStatus
from tests.cluster.conftest import Cluster, hits_and_no_wrong_byte, run_command, status_of, stored
from tests.memory_files import flip_bit
from tests.samples import Batch

pytestmark = pytest.mark.redis

BatchOf = Callable[..., Batch]
BAD = 5
PAGES = 20


@pytest.fixture
def arena() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "arena"


@pytest.fixture
def cluster(arena: Path) -> Iterator[Cluster]:
    """One node, whose arena is a file and which does not scrub."""
    cluster = Cluster(options=("--scrub-rate", "0"))
    cluster.start("ada", "--arena-path", str(arena))
    cluster.wait_for("ada")
    yield cluster
    cluster.close()


def corrupt_pages(cluster: Cluster, name: str) -> int:
    with attnstore.connect(cluster.nodes[name].url) as client:
        return client.stats().corrupt_pages


def test_a_corrupt_page_is_not_handed_over(cluster: Cluster, batch_of: BatchOf, arena: Path) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        flip_bit(arena, batch.pages[BAD], 100)
        cluster.start("bob")
        cluster.wait_for("ada", "bob")
        drained = run_command("drain", "ada", "--wait", "30", "--directory", cluster.url)
        assert drained.returncode == 0, drained.stderr
        assert status_of(cluster)["ada"]["state"] == "drained"
        assert corrupt_pages(cluster, "ada") == 1
        with attnstore.connect(cluster.nodes["bob"].url) as bob:
            bob.register_layout(batch.namespace, batch.layout)
            found = bob.match(batch.namespace, [[page_hash] for page_hash in batch.hashes]).hits
            assert found == tuple(int(index != BAD) for index in range(PAGES))
        assert hits_and_no_wrong_byte(client, batch) == PAGES - 1
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts[BAD] is PageStatus.STORED
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_clusters_client_reports_what_it_finds_and_reads_the_other_copy(batch_of: BatchOf, arena: Path) -> None:
    cluster = Cluster(options=("--scrub-rate", "0", "--replicas", "2"))
    try:
        cluster.start("ada", "--arena-path", str(arena))
        cluster.start("bob")
        cluster.wait_for("ada", "bob")
        with attnstore.connect(cluster.url) as client:
            batch = stored(client, batch_of(PAGES))
            for page in batch.pages:
                flip_bit(arena, page, 100)
            assert hits_and_no_wrong_byte(client, batch) == PAGES
            with attnstore.connect(cluster.nodes["ada"].url) as ada:
                ada.register_layout(batch.namespace, batch.layout)
                assert ada.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 0
                assert ada.match(batch.namespace, [[page_hash] for page_hash in batch.hashes]).hits == (0,) * PAGES
                assert ada.stats().corrupt_pages == PAGES
            assert hits_and_no_wrong_byte(client, batch) == PAGES
    finally:
        cluster.close()
