"""Peers that write through lent memory with false data: bytes, places, files and namespaces."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attnstore
from attnstore import DType, PageLayout, PageStatus, memory_files
from attnstore.errors import (
    InvalidArgument,
    NamespaceUnknown,
    ProtocolError,
)
from attnstore.limits import SHM_LENT_BYTES_MAX, SHM_TAKE_PAGES_MAX
from attnstore.testing import StoreProcess
from attnstore.wire import shm
from attnstore.wire.shm import Item, Kind
from tests.integration.shm_peer import Peer
from tests.integration.shm_writing import assert_holds, registered, used_bytes
from tests.memory_files import sealed_file
from tests.samples import SMALL, Batch, make_batch

STORED, MISMATCH = PageStatus.STORED, PageStatus.CHECKSUM_MISMATCH
AT = [0, 4096, 8192]


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "256MiB", "--stall-ms", "1000") as node:
        yield node


def lent(peer: Peer, pages: list[bytes]) -> int:
    """Lends the node a file with the pages, one after the other, and returns the writable descriptor."""
    data = b"".join(pages)
    file, mapping = memory_files.create("peer", -(-len(data) // 4096) * 4096)
    mapping[: len(data)] = data
    peer.stream.send_with_descriptor(shm.encode_lend(len(mapping)), file)
    peer.stream.receive(frozenset({Kind.LENT}))
    return file


def take(peer: Peer, batch: Batch, offsets: list[int], checksums: list[int] | None = None) -> list[PageStatus]:
    sums = checksums or [attnstore.page_checksum(page) for page in batch.pages]
    items = [Item(*item) for item in zip(batch.hashes, sums, offsets, strict=True)]
    answer = peer.ask(shm.encode_take(batch.namespace, items), Kind.TAKEN, Kind.REFUSED)
    if answer.kind is Kind.REFUSED:
        raise shm.decode_refusal(answer.payload)
    return shm.decode_taken(answer.payload)


@pytest.fixture
def batch(node: StoreProcess, request: pytest.FixtureRequest) -> Batch:
    """Three pages that the node does not have, in a registered namespace."""
    with attnstore.connect(node.url, transport="grpc") as client:
        return registered(client, 3, request.node.name)


def test_a_page_whose_bytes_are_not_those_announced_is_not_stored(node: StoreProcess, batch: Batch) -> None:
    before = used_bytes(node)
    with Peer.greeted(node) as peer:
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, [0, 0, 8192]) == [STORED, MISMATCH, STORED]
        assert peer.locate(batch.namespace, *batch.hashes)[1] is PageStatus.MISSING
    assert used_bytes(node) == before + 2 * SMALL.page_bytes


def test_a_writer_that_changes_bytes_meanwhile_stores_what_it_announced_or_nothing(node: StoreProcess) -> None:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=1 << 19, block_tokens=1, dtype=DType.OPAQUE)
    batch = make_batch(1, model="scribbles", layout=layout)
    with attnstore.connect(node.url, transport="shm") as client, Peer.greeted(node) as peer:
        client.register_layout(batch.namespace, layout)
        file = lent(peer, batch.pages)
        done = threading.Event()

        def scribble() -> None:
            while not done.is_set():
                os.pwrite(file, b"\0" * 64, 500_000)
                os.pwrite(file, batch.pages[0][500_000:500_064], 500_000)

        scribbler = threading.Thread(target=scribble)
        scribbler.start()
        verdicts = set()
        try:
            for _ in range(200):
                [verdict] = take(peer, batch, [0])
                verdicts.add(verdict)
                if verdict is STORED:
                    buffers = batch.buffers()
                    assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 1
                    assert buffers == batch.pages
                    client.delete(batch.namespace, batch.hashes)
        finally:
            done.set()
            scribbler.join()
            os.close(file)
    assert verdicts <= {STORED, MISMATCH}


@pytest.mark.parametrize(
    "offset", [1, 3 * 4096, 1 << 40, (1 << 64) - 8193], ids=["across the end", "behind it", "far", "the largest"]
)
def test_a_page_outside_what_is_lent_is_refused_before_any_is_taken(node: StoreProcess, batch: Batch, offset: int) -> None:
    before = used_bytes(node)
    with Peer.greeted(node) as peer:
        os.close(lent(peer, batch.pages))
        with pytest.raises(InvalidArgument, match="no memory is lent"):
            take(peer, batch, [0, 4096, 8192 + offset])
        assert used_bytes(node) == before
        assert take(peer, batch, AT) == [STORED] * 3, "the connection goes on"


def test_nothing_is_taken_before_memory_is_lent(node: StoreProcess, batch: Batch) -> None:
    with Peer.greeted(node) as peer, pytest.raises(InvalidArgument, match="no memory is lent"):
        take(peer, batch, AT)


def test_what_is_lent_later_replaces_what_was_lent_before(node: StoreProcess, batch: Batch) -> None:
    with Peer.greeted(node) as peer:
        os.close(lent(peer, [bytes(4096)] * 3))
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, AT) == [STORED] * 3
    assert_holds(node, batch)


def test_a_namespace_of_nobody_and_one_of_another_tenant_are_unknown(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('alice = "alices-token"\nbob = "bobs-token"\n')
    with StoreProcess("--capacity", "8MiB", "--tokens-file", str(tokens)) as node:
        with attnstore.connect(node.url, token="alices-token", transport="shm") as alice:
            batch = registered(alice, 1, "alices")
            with Peer.greeted(node, "bobs-token") as bob:
                os.close(lent(bob, batch.pages))
                with pytest.raises(NamespaceUnknown):
                    take(bob, batch, [0])
            assert alice.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,)
        with Peer.greeted(node, "bobs-token") as bob:
            os.close(lent(bob, batch.pages))
            with pytest.raises(NamespaceUnknown):
                take(bob, make_batch(1, model="nobodys"), [0])


@pytest.mark.parametrize(
    ("make", "size_bytes"),
    [
        (lambda: sealed_file(4096, seals=fcntl.F_SEAL_GROW), 4096),
        (lambda: os.open("/dev/null", os.O_RDONLY), 4096),
        (lambda: sealed_file(4096), 8192),
        (lambda: sealed_file(4096), 0),
        (lambda: sealed_file(4096), SHM_LENT_BYTES_MAX + 1),
    ],
    ids=["could shrink", "a device", "ends too soon", "nothing", "too much"],
)
def test_a_file_that_could_kill_the_node_is_refused_and_the_node_lives(
    node: StoreProcess, batch: Batch, make: Callable[[], int], size_bytes: int
) -> None:
    descriptors = f"/proc/{node.process.pid}/fd"
    with Peer.greeted(node) as peer:
        before = len(os.listdir(descriptors))
        for _ in range(20):
            file = make()
            peer.stream.send_with_descriptor(shm.encode_lend(size_bytes), file)
            os.close(file)
            answer = peer.stream.receive(frozenset({Kind.REFUSED}))
            assert isinstance(shm.decode_refusal(answer.payload), ProtocolError)
        assert len(os.listdir(descriptors)) < before + 10, "what is refused does not stay open"
        os.close(lent(peer, batch.pages))
        assert take(peer, batch, AT) == [STORED] * 3


def test_lending_without_a_file_ends_the_connection(node: StoreProcess) -> None:
    with Peer.greeted(node) as peer:
        assert isinstance(peer.refusal(shm.encode_lend(4096)), ProtocolError)
        assert peer.is_closed_by_the_node()


def test_more_pages_than_fit_a_request_end_the_connection_at_its_header(node: StoreProcess) -> None:
    with Peer.greeted(node) as peer:
        header = shm.encode_take(b"n" * 32, [])[:8] + (SHM_TAKE_PAGES_MAX + 1).to_bytes(4, "little")
        assert isinstance(peer.refusal(header), ProtocolError)
        assert peer.is_closed_by_the_node()
