"""Short deadlines and hung nodes: which failures count against a node, how the remaining time is used, and what is logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

import attnstore
from attnstore import PageStatus, errors
from attnstore.limits import NODE_FAIR_MS, SEGMENT_BLOCKS
from attnstore.testing import StoreProcess
from tests.cluster.conftest import hits_and_no_wrong_byte, inner, stored
from tests.samples import Batch, eventually

BatchOf = Callable[..., Batch]
PAGES = 12 * SEGMENT_BLOCKS
HURRIED_MS = NODE_FAIR_MS / 10
SHORT_MS = 800
"""More than a node's fair time, and less than the time limit of one node for a match."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[StoreProcess, ...]]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(StoreProcess("--capacity", "64MiB")) for _ in range(3))


@contextmanager
def suspended(*nodes: StoreProcess) -> Iterator[None]:
    for node in nodes:
        node.suspend()
    try:
        yield
    finally:
        for node in nodes:
            node.resume()


def target(nodes: tuple[StoreProcess, ...], replicas: int = 1) -> str:
    return "grpc://" + ",".join(node.address for node in nodes) + f"?replicas={replicas}"


def usable(client: attnstore.ClusterClient) -> int:
    """Returns to how many nodes the client makes calls."""
    return len(inner(client)._followed().usable())


def pages_on(node: StoreProcess, batch: Batch) -> list[bytes]:
    with attnstore.connect(node.url) as client:
        client.register_layout(batch.namespace, batch.layout)
        hits = client.match(batch.namespace, [[page_hash] for page_hash in batch.hashes]).hits
        return [page_hash for page_hash, hit in zip(batch.hashes, hits, strict=True) if hit]


def test_callers_in_a_hurry_leave_every_node_in_use(nodes: tuple[StoreProcess, ...], batch_of: BatchOf) -> None:
    with attnstore.connect(target(nodes)) as client:
        batch = stored(client, batch_of(PAGES))
        with suspended(*nodes):
            for _ in range(4):
                client.match(batch.namespace, [batch.hashes], deadline_ms=HURRIED_MS)
                client.read(batch.namespace, batch.hashes, batch.buffers(), deadline_ms=HURRIED_MS)
                with pytest.raises(errors.Retryable):
                    client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=HURRIED_MS)
                with pytest.raises(errors.Retryable):
                    client.stats(deadline_ms=HURRIED_MS)
            assert usable(client) == len(nodes)
        assert client.match(batch.namespace, [batch.hashes]).hits == (PAGES,)
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_node_that_hangs_is_found_though_every_caller_is_in_a_hurry(nodes: tuple[StoreProcess, ...], batch_of: BatchOf) -> None:
    with attnstore.connect(target(nodes)) as client:
        batch = stored(client, batch_of(PAGES))
        with suspended(nodes[0]):

            def is_found() -> bool:
                client.match(batch.namespace, [batch.hashes], deadline_ms=HURRIED_MS)
                return usable(client) == len(nodes) - 1

            assert eventually(is_found)
        assert eventually(lambda: usable(client) == len(nodes))


def test_whoever_has_time_does_not_get_the_answer_of_a_caller_in_a_hurry(
    nodes: tuple[StoreProcess, ...], batch_of: BatchOf
) -> None:
    with attnstore.connect(target(nodes)) as client:
        batch = stored(client, batch_of(PAGES))
        with suspended(*nodes):
            patient_ms = HURRIED_MS * 100
            with ThreadPoolExecutor(2) as callers:
                hurried = callers.submit(client.match, batch.namespace, [batch.hashes], deadline_ms=HURRIED_MS)
                patient = callers.submit(client.match, batch.namespace, [batch.hashes], deadline_ms=patient_ms)
                assert hurried.result().error is not None
                for node in nodes:
                    node.resume()
                assert patient.result().hits == (PAGES,)


def test_a_call_that_no_node_answered_says_so_and_is_not_a_store_without_the_pages(
    nodes: tuple[StoreProcess, ...], batch_of: BatchOf
) -> None:
    with attnstore.connect(target(nodes)) as client:
        batch = stored(client, batch_of(PAGES))
        assert client.match(batch.namespace, [batch.hashes]).error is None
        with suspended(*nodes):
            found = client.match(batch.namespace, [batch.hashes], deadline_ms=SHORT_MS)
            assert (found.hits, type(found.error)) == ((0,), errors.DeadlineExceeded)
            assert eventually(lambda: _match(client, batch) and not usable(client), 20)
            # From here on no node is asked.
            found = client.match(batch.namespace, [batch.hashes], deadline_ms=SHORT_MS)
            assert (found.hits, type(found.error)) == ((0,), errors.Unavailable)
            read = client.read(batch.namespace, batch.hashes, batch.buffers(), deadline_ms=SHORT_MS)
            assert (set(read.statuses), type(read.error)) == ({PageStatus.INCOMPLETE}, errors.Unavailable)
            with pytest.raises(errors.Unavailable):
                client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=SHORT_MS)
            with pytest.raises(errors.Unavailable):
                client.lease(batch.namespace, batch.hashes, 1_000, deadline_ms=SHORT_MS)
        assert eventually(lambda: usable(client) == len(nodes), 20)
        absent = client.match(batch.namespace, [batch_of(1, "absent").hashes])
        assert (absent.hits, absent.error) == ((0,), None)
        assert client.read(batch.namespace, [], []).error is None


def test_a_hung_owner_leaves_the_other_copy_the_time_to_answer_a_match_and_a_read(
    nodes: tuple[StoreProcess, ...], batch_of: BatchOf
) -> None:
    with attnstore.connect(target(nodes, replicas=2)) as client:
        batch = stored(client, batch_of(PAGES))
        with suspended(nodes[1]):
            found = client.match(batch.namespace, [batch.hashes], lease_ms=60_000, deadline_ms=SHORT_MS)
            assert found.hits == (PAGES,)
    with attnstore.connect(target(nodes, replicas=2)) as client:
        client.register_layout(batch.namespace, batch.layout)
        with suspended(nodes[1]):
            assert hits_and_no_wrong_byte(client, batch, 2_000) == PAGES


def test_pages_of_a_hung_owner_are_written_to_the_node_that_is_next_in_line(
    nodes: tuple[StoreProcess, ...], batch_of: BatchOf
) -> None:
    with attnstore.connect(target(nodes)) as client:
        batch = batch_of(PAGES)
        client.register_layout(batch.namespace, batch.layout)
        with suspended(nodes[2]):
            written = client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=4_000)
            assert all(verdict.is_kept for verdict in written.verdicts)
        assert set(pages_on(nodes[0], batch)) | set(pages_on(nodes[1], batch)) == set(batch.hashes)


def test_a_lease_of_which_a_part_lies_on_a_hung_node_is_renewed_or_released_long_before_the_deadline(
    nodes: tuple[StoreProcess, ...], batch_of: BatchOf
) -> None:
    patient_ms = 60_000
    with attnstore.connect(target(nodes)) as client:
        batch = stored(client, batch_of(PAGES))
        first, second = (client.match(batch.namespace, [batch.hashes], lease_ms=60_000).lease for _ in range(2))
        assert first is not None
        assert second is not None
        with suspended(next(node for node in nodes if pages_on(node, batch))):
            began_s = time.monotonic()
            with pytest.raises(errors.LeaseExpired):
                client.renew(first, 60_000, deadline_ms=patient_ms)
            assert not client.release(second, deadline_ms=patient_ms)
            assert (time.monotonic() - began_s) * 1e3 < patient_ms / 2


def _match(client: attnstore.ClusterClient, batch: Batch) -> bool:
    return client.match(batch.namespace, [batch.hashes], deadline_ms=SHORT_MS).hits == (0,)
