"""Simulated links: whatever a link does to the time of bytes, it does not change the bytes."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import attnstore
from attnstore.address import Address
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link

_WAIT_S = 30
_LAYOUT = attnstore.PageLayout(layers=4, kv_heads=2, head_dim=64)
_NAMESPACE = attnstore.namespace(_LAYOUT, model=b"link")
_HASHES = attnstore.block_hashes(_NAMESPACE, range(64 * _LAYOUT.block_tokens), _LAYOUT.block_tokens)
_PAGES = [random.Random(index).randbytes(_LAYOUT.page_bytes) for index in range(len(_HASHES))]


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """A server that echoes what it receives until the client has sent everything, then ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass  # the link was cut

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    accepting.join()
    listener.close()


def _connect(link: Link) -> socket.socket:
    return Address.parse(link.addresses[0]).connect(_WAIT_S)


def _echoed(connection: socket.socket, data: bytes) -> bytes:
    """Sends everything, ends the sending side, and returns the echo."""

    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    received = bytearray()
    while piece := connection.recv(1 << 16):
        received += piece
    sending.join()
    return bytes(received)


@pytest.mark.parametrize(
    ("profile", "size_bytes"),
    [("loopback", 8 << 20), ("1g", 2 << 20), ("inf@4ms~2ms", 4 << 20), ("400m/100m@10ms~1ms", 200_000), ("loopback", 0)],
)
def test_bytes_arrive_unchanged_and_the_end_after_them(echo: str, profile: str, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    with Link([echo], profile) as link, _connect(link) as connection:
        assert hashlib.sha256(_echoed(connection, data)).digest() == hashlib.sha256(data).digest()
        traffic = link.traffic()
    assert (traffic.connections, traffic.up_bytes, traffic.down_bytes) == (1, size_bytes, size_bytes)


def test_no_transfer_is_faster_than_the_link(echo: str) -> None:
    size_bytes, rate, rtt_s, burst_s = 250_000, 10e6, 0.03, 0.001
    with Link([echo], "10m@30ms") as link, _connect(link) as connection:
        began = time.monotonic()
        _echoed(connection, bytes(size_bytes))
        assert time.monotonic() - began >= size_bytes * 8 / rate + rtt_s - 2 * burst_s


def test_a_stalled_link_moves_nothing_and_loses_nothing(echo: str) -> None:
    with Link([echo]) as link, _connect(link) as connection:
        connection.sendall(b"before")
        assert connection.recv(16) == b"before"
        link.stall()
        connection.sendall(b"during")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(16)
        connection.settimeout(_WAIT_S)
        link.restore()
        assert connection.recv(16) == b"during"


def test_a_cut_link_breaks_connections_old_and_new_until_it_is_restored(echo: str) -> None:
    with Link([echo], "1g@2ms") as link:
        with _connect(link) as old:
            old.sendall(b"before")
            assert old.recv(16) == b"before"
            link.cut()
            assert _is_broken(old)
            assert _is_refused(link)
        link.restore()
        with _connect(link) as connection:
            assert _echoed(connection, b"after") == b"after"


def test_a_link_may_be_cut_while_it_is_stalled_and_full(echo: str) -> None:
    with Link([echo], "inf@1ms") as link, _connect(link) as connection:
        link.stall()
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            all(connection.send(bytes(1 << 20)) for _ in range(1_000))
        connection.settimeout(_WAIT_S)
        link.cut()
        assert _is_broken(connection)
        link.restore()
        with _connect(link) as another:
            assert _echoed(another, b"after") == b"after"


def test_the_profile_changes_in_the_middle_of_a_transfer(echo: str) -> None:
    data = random.Random(1).randbytes(3 << 20)
    with Link([echo], "100m@2ms") as link, _connect(link) as connection:
        changes = threading.Thread(target=lambda: [link.change(profile) for profile in ("loopback", "10m", "inf@20ms", "10g")])
        changes.start()
        assert _echoed(connection, data) == data
        changes.join()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_worker_reaches_a_nodes_pages_through_the_link(transport: str) -> None:
    with StoreProcess("--capacity", "64MiB") as node, Link.to_node(node.url, "10g@1ms") as link:
        with attnstore.connect(link.url, transport=transport, deadline_ms=_WAIT_S * 1000) as client:
            client.register_layout(_NAMESPACE, _LAYOUT)
            assert all(verdict.is_kept for verdict in client.write(_NAMESPACE, _HASHES, _PAGES).verdicts)
            buffers = [bytearray(_LAYOUT.page_bytes) for _ in _HASHES]
            assert client.read(_NAMESPACE, _HASHES, buffers).leading_hits == len(_HASHES)
        traffic = link.traffic()
    assert buffers == _PAGES
    pages_bytes = len(_PAGES) * _LAYOUT.page_bytes
    assert traffic.down_bytes > pages_bytes, "pages were read past the link"
    assert traffic.up_bytes > pages_bytes, "pages were written past the link"


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_read_over_a_link_that_fails_is_a_miss_and_the_next_one_is_served(transport: str, fault: str) -> None:
    with (
        StoreProcess("--capacity", "64MiB") as node,
        Link.to_node(node.url) as link,
        attnstore.connect(link.url, transport=transport, deadline_ms=_WAIT_S * 1000) as client,
    ):
        client.register_layout(_NAMESPACE, _LAYOUT)
        client.write(_NAMESPACE, _HASHES, _PAGES)
        buffers = [bytearray(_LAYOUT.page_bytes) for _ in _HASHES]
        link.change("1m")
        faulty = threading.Timer(0.3, getattr(link, fault))
        faulty.start()
        broken = client.read(_NAMESPACE, _HASHES, buffers, deadline_ms=1_500)
        faulty.join()
        assert broken.error is not None
        hits = broken.leading_hits
        assert hits < len(_HASHES)
        assert buffers[:hits] == _PAGES[:hits]
        link.restore()
        link.change("loopback")
        answer = _read_until_it_works(client, buffers)
        assert answer.leading_hits == len(_HASHES)
    assert buffers == _PAGES


def test_a_read_over_a_flapping_link_is_late_and_right() -> None:
    with (
        StoreProcess("--capacity", "64MiB") as node,
        Link.to_node(node.url, "400m") as link,
        attnstore.connect(link.url, transport="tcp", deadline_ms=_WAIT_S * 1000) as client,
    ):
        client.register_layout(_NAMESPACE, _LAYOUT)
        link.flap(20)
        client.write(_NAMESPACE, _HASHES, _PAGES)
        buffers = [bytearray(_LAYOUT.page_bytes) for _ in _HASHES]
        assert client.read(_NAMESPACE, _HASHES, buffers).leading_hits == len(_HASHES)
    assert buffers == _PAGES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "nowhere"], "--target nowhere: must be host:port"),
        (["--target", "127.0.0.1:1", "--profile", "fast"], "is no link"),
        (["--target", "127.0.0.1:1", "--target", "127.0.0.1:2", "--listen", "127.0.0.1:0"], "single --target"),
        (["--target", "127.0.0.1:1", "--listen", "192.0.2.1:0"], "Cannot assign"),
    ],
)
def test_bad_options_end_the_command_with_one_line(options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "attnstore.testing.link", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_relay_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="Cannot assign"):
        Link(["127.0.0.1:9"], listen_host="192.0.2.1")


def test_an_unknown_command_is_refused_and_the_link_goes_on(echo: str) -> None:
    with Link([echo]) as link:
        with pytest.raises(RuntimeError, match="flap"):
            link.flap(0)
        with _connect(link) as connection:
            assert _echoed(connection, b"still here") == b"still here"


def test_a_target_that_is_not_there_breaks_the_connection_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with Link([address]) as link:
        assert _is_refused(link)
        assert _is_refused(link)


def _is_refused(link: Link) -> bool:
    """Returns whether a new connection ends before it moves anything: at once, or at its first use."""
    try:
        with _connect(link) as connection:
            return _is_broken(connection)
    except ConnectionError:
        return True


def _is_broken(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def _read_until_it_works(client: attnstore.Client, buffers: list[bytearray]) -> attnstore.ReadResult:
    """gRPC waits a moment before it connects again."""
    until = time.monotonic() + _WAIT_S
    answer = client.read(_NAMESPACE, _HASHES, buffers)
    while answer.error is not None and time.monotonic() < until:
        time.sleep(0.05)
        answer = client.read(_NAMESPACE, _HASHES, buffers)
    return answer
