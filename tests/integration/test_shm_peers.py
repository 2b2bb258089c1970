"""Hostile, broken, slow and foreign peers of the shared memory socket of a real node; and what belongs to another tenant."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import attnstore
from attnstore import DType, PageLayout, PageStatus
from attnstore.errors import InvalidArgument, NamespaceUnknown, PermissionDenied, ProtocolError, Unauthenticated
from attnstore.limits import CHANNEL_CONNECTIONS_MAX, CHANNEL_UNAUTHENTICATED_MAX
from attnstore.testing import StoreProcess
from attnstore.wire import shm
from attnstore.wire.shm import Kind, Place
from tests.integration.shm_peer import Peer, open_channel
from tests.samples import SMALL, eventually, make_batch

KIB_128 = PageLayout(layers=1, kv_heads=1, head_dim=1 << 16, block_tokens=1, dtype=DType.OPAQUE)
"""128 KiB per page."""


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "16MiB", "--stall-ms", "300") as node:
        yield node


@pytest.fixture(scope="module")
def two_tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    tokens.write_text('alice = "alices-token"\nbob = "bobs-token"\n')
    with StoreProcess("--capacity", "8MiB", "--tokens-file", str(tokens)) as node:
        yield node


def a_stored_page(node: StoreProcess, model: str) -> tuple[bytes, bytes, bytes]:
    """Namespace, hash and bytes of a page that the node holds."""
    batch = make_batch(1, model=model)
    with attnstore.connect(node.url, transport="grpc") as client:
        client.register_layout(batch.namespace, batch.layout)
        client.write(batch.namespace, batch.hashes, batch.pages)
    return batch.namespace, batch.hashes[0], batch.pages[0]


def test_a_located_page_is_in_the_extent_handed_out(node: StoreProcess) -> None:
    namespace, page_hash, page = a_stored_page(node, "handed out")
    with Peer.greeted(node) as peer:
        place, missing = peer.locate(namespace, page_hash, b"?" * 32)
        assert missing is PageStatus.MISSING
        assert isinstance(place, Place)
        extent = peer.map(place)
        assert extent is not None
        assert extent[place.offset_bytes : place.offset_bytes + place.size_bytes] == page
        assert attnstore.page_checksum(page) == place.checksum


def test_a_wrong_token_is_refused(node: StoreProcess) -> None:
    address, _ = open_channel(node)
    with Peer.connected(address) as peer:
        assert isinstance(peer.refusal(shm.encode_hello(b"w" * 32)), Unauthenticated)
        assert peer.is_closed_by_the_node()


def test_a_token_opens_one_connection_and_no_second(node: StoreProcess) -> None:
    address, token = open_channel(node)
    with Peer.connected(address) as first, Peer.connected(address) as second:
        first.ask(shm.encode_hello(token), Kind.WELCOME)
        assert isinstance(second.refusal(shm.encode_hello(token)), Unauthenticated)


def test_another_version_is_refused_and_spends_no_token(node: StoreProcess) -> None:
    address, token = open_channel(node)
    hello = shm.encode_hello(token)
    with Peer.connected(address) as peer:
        error = peer.refusal(hello[:8] + (7).to_bytes(4, "little") + hello[12:])
        assert isinstance(error, InvalidArgument)
    with Peer.connected(address) as peer:
        peer.ask(hello, Kind.WELCOME)


@pytest.mark.parametrize(
    "first",
    [
        shm.encode_locate(b"n" * 32, None, [b"h" * 32]),
        shm.encode_map(0, 1),
        shm.encode_mapped(0, 4096),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 64,
    ],
    ids=["locate", "map", "a node's message", "another protocol", "zeros"],
)
def test_whoever_does_not_say_hello_first_is_sent_away(node: StoreProcess, first: bytes) -> None:
    address, _ = open_channel(node)
    with Peer.connected(address) as peer:
        assert isinstance(peer.refusal(first), ProtocolError)
        assert peer.is_closed_by_the_node()


def test_a_message_over_its_limit_ends_the_connection_before_its_payload(node: StoreProcess) -> None:
    with Peer.greeted(node) as peer:
        header = shm.encode_locate(b"n" * 32, None, [])[:8] + (1 << 31).to_bytes(4, "little")
        assert isinstance(peer.refusal(header), ProtocolError)
        assert peer.is_closed_by_the_node()


def test_a_wrong_namespace_is_refused_and_the_connection_goes_on(node: StoreProcess) -> None:
    namespace, page_hash, _ = a_stored_page(node, "goes on")
    with Peer.greeted(node) as peer:
        assert isinstance(peer.refusal(shm.encode_locate(b"?" * 32, None, [page_hash])), NamespaceUnknown)
        assert isinstance(peer.locate(namespace, page_hash)[0], Place)


def test_an_extent_that_was_not_located_is_not_handed_out(node: StoreProcess) -> None:
    namespace, page_hash, _ = a_stored_page(node, "not located")
    with Peer.greeted(node) as told, Peer.greeted(node) as guessing:
        place = told.locate(namespace, page_hash)[0]
        assert isinstance(place, Place)
        assert guessing.map(place) is None
        assert told.map(place._replace(tenancy=place.tenancy + 1)) is None
        assert told.map(place._replace(extent=(1 << 32) - 1)) is None
        assert told.map(place) is not None


SENT = 50
MAP, LEND = shm.encode_map(0, 9), shm.encode_lend(SMALL.page_bytes)
NOT_DUE = {
    "one with a MAP": [(MAP, 1)],
    "one with the payload of a MAP": [(MAP[: shm.HEADER_BYTES], 0), (MAP[shm.HEADER_BYTES :], 1)],
    "two with a LEND": [(LEND, 2)],
    "three with a LEND": [(LEND, 3)],
    "one with each half of a LEND": [(LEND[:4], 1), (LEND[4:], 1)],
}
"""The bytes that a peer sends, and the number of descriptors with them."""


@pytest.mark.parametrize("parts", NOT_DUE.values(), ids=NOT_DUE.keys())
def test_descriptors_that_are_not_due_are_refused_and_none_stays_open(node: StoreProcess, parts: list[tuple[bytes, int]]) -> None:
    descriptors = f"/proc/{node.process.pid}/fd"
    before = len(os.listdir(descriptors))
    for _ in range(SENT):
        with Path("/dev/null").open() as file, Peer.greeted(node) as peer:
            for content, count in parts:
                socket.send_fds(peer.connection, [content], [file.fileno()] * count)
            with pytest.raises(ProtocolError, match="descriptor"):
                raise peer.refusal(b"")
            assert peer.is_closed_by_the_node()
    # Connections of other tests may begin or end meanwhile; far more connections than those were made here.
    assert eventually(lambda: len(os.listdir(descriptors)) < before + SENT // 2)


@pytest.mark.parametrize("sent", [0, 5, 20], ids=["nothing", "half a header", "half a payload"])
def test_a_silent_peer_loses_its_connection(node: StoreProcess, sent: int) -> None:
    address, token = open_channel(node)
    with Peer.connected(address) as peer:
        peer.connection.sendall(shm.encode_hello(token)[:sent])
        assert peer.is_closed_by_the_node()


def test_a_peer_that_reads_no_answer_loses_its_connection_and_nobody_else_waits(node: StoreProcess) -> None:
    namespace, page_hash, page = a_stored_page(node, "reads nothing")
    request = shm.encode_locate(namespace, None, [page_hash] * 256)
    with Peer.greeted(node) as stalled, Peer.greeted(node) as other:
        with pytest.raises((TimeoutError, ConnectionError)):  # noqa: PT012 - whichever send finds the connection dead
            while True:
                stalled.connection.sendall(request)
        place = other.locate(namespace, page_hash)[0]
        assert isinstance(place, Place)
        extent = other.map(place)
        assert extent is not None
        assert extent[place.offset_bytes : place.offset_bytes + len(page)] == page


def test_silent_peers_take_no_place_of_those_that_have_shown_a_token(node: StoreProcess) -> None:
    address, _ = open_channel(node)
    namespace, page_hash, _ = a_stored_page(node, "beside the silent")
    with Peer.greeted(node) as before:
        silent = [Peer.connected(address) for _ in range(CHANNEL_UNAUTHENTICATED_MAX + CHANNEL_CONNECTIONS_MAX)]
        assert silent[0].is_closed_by_the_node(), "the one that was silent longest makes room"
        with Peer.greeted(node) as after:
            for peer in (before, after):
                assert isinstance(peer.locate(namespace, page_hash)[0], Place)
        for peer in silent:
            peer.stream.close()


def test_more_idle_clients_than_places_all_keep_shared_memory(node: StoreProcess) -> None:
    batch = make_batch(1, model="idle workers")
    workers = [attnstore.connect(node.url, transport="shm") for _ in range(CHANNEL_CONNECTIONS_MAX + 12)]
    for worker in workers:
        worker.register_layout(batch.namespace, batch.layout)
    workers[0].write(batch.namespace, batch.hashes, batch.pages)
    for _ in range(2):
        for worker in workers:
            buffers = batch.buffers()
            assert worker.read(batch.namespace, batch.hashes, buffers).transport == "shm"
            assert buffers == batch.pages
    for worker in workers:
        worker.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_of_the_host_is_refused(node: StoreProcess) -> None:
    address, token = open_channel(node)
    directory = Path(address).parent
    assert directory.stat().st_mode & 0o777 == 0o700, "nobody else comes even near the socket"
    script = """
import os, sys
from attnstore.errors import PermissionDenied
from attnstore.wire import shm
from tests.integration.shm_peer import Peer
os.setuid(65534)
error = Peer.connected(sys.argv[1]).refusal(shm.encode_hello(bytes.fromhex(sys.argv[2])))
print(type(error).__name__)
"""
    try:
        directory.chmod(0o755)
        Path(address).chmod(0o777)
        done = subprocess.run([sys.executable, "-c", script, address, token.hex()], capture_output=True, text=True, timeout=30)
    finally:
        directory.chmod(0o700)
    assert done.stdout == f"{PermissionDenied.__name__}\n", done.stderr
    with Peer.connected(address) as peer:
        peer.ask(shm.encode_hello(token), Kind.WELCOME)


def test_a_draining_node_lets_idle_peers_go_and_removes_its_socket() -> None:
    with StoreProcess("--capacity", "16MiB", "--drain-ms", "60000") as node, Peer.greeted(node) as peer:
        address, _ = open_channel(node)
        node.process.send_signal(signal.SIGTERM)
        assert peer.is_closed_by_the_node()
        assert node.process.wait(20) == 0
        assert not Path(address).parent.exists()


def test_another_tenants_namespace_is_unknown(two_tenants: StoreProcess) -> None:
    batch = make_batch(1, model="alices own")
    with attnstore.connect(two_tenants.url, token="alices-token", transport="grpc") as alice:
        alice.register_layout(batch.namespace, SMALL)
        alice.write(batch.namespace, batch.hashes, batch.pages)
    with Peer.greeted(two_tenants, "bobs-token") as bob, Peer.greeted(two_tenants, "alices-token") as alices:
        assert isinstance(bob.refusal(shm.encode_locate(batch.namespace, None, batch.hashes)), NamespaceUnknown)
        place = alices.locate(batch.namespace, batch.hashes[0])[0]
        assert isinstance(place, Place)
        assert bob.map(place) is None


def test_a_mapped_extent_never_shows_another_tenants_bytes_and_memory_stays_within_the_capacity(
    two_tenants: StoreProcess,
) -> None:
    """Alice maps every extent that she is shown and keeps it, while the arena alternates between alice and bob."""
    pages_each = 100  # one and a half times the capacity
    fills = {"alice": 0xAA, "bob": 0xBB}
    spaces = {name: attnstore.namespace(KIB_128, model=name.encode()) for name in fills}
    mapped: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}
    places: list[Place] = []
    for turn in range(6):
        name = ("alice", "bob")[turn % 2]
        hashes = [bytes([turn]) + number.to_bytes(31, "big") for number in range(pages_each)]
        with (
            attnstore.connect(two_tenants.url, token=f"{name}s-token", transport="tcp") as client,
            Peer.greeted(two_tenants, f"{name}s-token") as peer,
        ):
            client.register_layout(spaces[name], KIB_128)
            client.write(spaces[name], hashes, [bytes([fills[name]]) * KIB_128.page_bytes] * pages_each)
            found = [place for place in peer.locate(spaces[name], *hashes) if isinstance(place, Place)]
            layout = shm.ExtentLayout(peer.extent_bytes)
            for place in found:
                if (place.extent, place.tenancy) not in mapped:
                    extent = peer.map(place)
                    assert extent is not None
                    mapped[place.extent, place.tenancy] = fills[name], extent
            places += found
        limit_bytes = (8 << 20) // layout.extent_bytes * layout.file_bytes
        assert _shared_bytes(two_tenants) <= limit_bytes < (8 << 20) * 1.01
    for fill, extent in mapped.values():
        assert set(extent[: layout.extent_bytes]) <= {0, fill}, "bytes of somebody else"
    valid = 0
    for place in places:
        fill, extent = mapped[place.extent, place.tenancy]
        at = layout.stamps_offset_bytes + 8 * layout.stamp_index(place.offset_bytes)
        if int.from_bytes(extent[at : at + 8], "little") == place.stamp:
            valid += 1
            assert set(extent[place.offset_bytes : place.offset_bytes + place.size_bytes]) == {fill}
    assert 0 < valid <= 64, "only what the node holds now counts as valid"


def _shared_bytes(node: StoreProcess) -> int:
    """Returns the memory of all extents that the node holds open, each counted once."""
    blocks: dict[int, int] = {}
    for link in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the node closes its own descriptors meanwhile
            if "attnstore-extent" in os.readlink(link):
                status = link.stat()
                blocks[status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())
