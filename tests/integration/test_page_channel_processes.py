"""The tcp transport between processes: either side is killed, stopped or drained, and the other goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.limits import CHANNEL_READ_HASHES_MAX
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from tests.channels import WIDE, dial, open_channel, say_hello
from tests.samples import SMALL, Batch, eventually, make_batch, read_back, stored

OK, MISSING, INCOMPLETE, STORED = PageStatus.OK, PageStatus.MISSING, PageStatus.INCOMPLETE, PageStatus.STORED

HALF = """
import sys, time
from tests.channels import ask, dial, page_header, say_hello
from tests.samples import make_batch
from tests.channels import WIDE
direction, port, token, model, pages = sys.argv[1:]
batch = make_batch(int(pages), model=model, layout=WIDE)
stream = dial(int(port), 16384)
say_hello(stream, bytes.fromhex(token))
stream.receive()
if direction == "write":
    stream.send(page_header(batch, 0), batch.pages[0][:1000])
else:
    ask(stream, batch)
    stream.receive()
print("half", flush=True)
time.sleep(60)
"""


@contextmanager
def half_way(node: StoreProcess, direction: str, batch: Batch, model: str) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own that stops in the middle of a transfer. Killed at the end, if it still runs."""
    port, token = open_channel(node.address)
    client = subprocess.Popen(
        [sys.executable, "-c", HALF, direction, str(port), token.hex(), model, str(len(batch.pages))],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "half\n"
        yield client
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


@pytest.fixture
def client(shared_node: StoreProcess) -> Iterator[attnstore.Client]:
    with attnstore.connect(shared_node.url, transport="tcp", deadline_ms=20_000) as client:
        yield client


@pytest.fixture
def last_client(node: StoreProcess) -> Iterator[attnstore.Client]:
    """The client of a node that the test ends."""
    with attnstore.connect(node.url, transport="tcp", deadline_ms=20_000) as client:
        yield client


# A client dies


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_killed_client_leaves_nothing_behind(shared_node: StoreProcess, client: attnstore.Client, direction: str) -> None:
    model = f"killed in a {direction}"
    batch = make_batch(24, model=model, layout=WIDE)
    client.register_layout(batch.namespace, WIDE)
    if direction == "read":
        client.write(batch.namespace, batch.hashes, batch.pages)
    with half_way(shared_node, direction, batch, model) as half:

        def held() -> int:
            now = client.stats()
            return now.pages_pinned if direction == "read" else now.pages_arriving

        assert eventually(lambda: held() > 0), "between two pages none may be on its way"
        half.send_signal(signal.SIGKILL)
        assert eventually(lambda: held() == 0)
    client.write(batch.namespace, batch.hashes, batch.pages)
    assert read_back(client, batch).leading_hits == 24


def test_a_stopped_client_delays_nobody(shared_node: StoreProcess, client: attnstore.Client) -> None:
    model = "stopped"
    batch = stored(client, 24, model, WIDE)
    with half_way(shared_node, "read", batch, model) as half:
        half.send_signal(signal.SIGSTOP)
        assert read_back(client, batch).leading_hits == 24
        assert client.match(batch.namespace, [batch.hashes]).hits == (24,)
        assert client.stats().pages_pinned > 0


# A node dies


def test_a_node_killed_during_a_read_costs_what_had_not_arrived(node: StoreProcess, last_client: attnstore.Client) -> None:
    batch = stored(last_client, 60, "node killed in a read", WIDE)
    buffers = batch.buffers()
    told: list[tuple[int, int]] = []

    def on_layer(layer: int, pages: int) -> None:
        told.append((layer, pages))
        if layer == 0:
            node.kill()

    result = last_client.read(batch.namespace, batch.hashes, buffers, on_layer=on_layer)
    assert isinstance(result.error, errors.Unavailable)
    assert INCOMPLETE in result.statuses
    assert told[0] == (0, 60)
    assert [buffer[: WIDE.layer_bytes] for buffer in buffers] == [page[: WIDE.layer_bytes] for page in batch.pages]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_node_killed_during_a_write_is_unavailable(node: StoreProcess, channels: int) -> None:
    with attnstore.connect(node.url, transport="tcp", channels=channels, deadline_ms=20_000) as client:
        stored(client, 3, "before the end")
        batch = make_batch(60, model="node killed in a write", layout=WIDE)
        client.register_layout(batch.namespace, WIDE)
        node.suspend()  # pages accumulate in flight
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(client.write, batch.namespace, batch.hashes, batch.pages)
            node.kill()
            assert isinstance(writing.exception(30), errors.Unavailable)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_restarted_node_is_found_again_with_what_it_forgot(channels: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    first = StoreProcess("--listen", address, "--capacity", "16MiB")
    try:
        with attnstore.connect(first.url, transport="tcp", channels=channels, deadline_ms=20_000) as client:
            batch = stored(client, 4, "restarted")
            assert read_back(client, batch).leading_hits == 4
            epoch = client.describe().epoch
            first.kill()
            with StoreProcess("--listen", address, "--capacity", "16MiB"):
                assert read_back(client, batch).statuses == (MISSING,) * 4
                assert client.describe().epoch != epoch
                assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {STORED}
                assert read_back(client, batch).leading_hits == 4
    finally:
        first.kill()


def test_a_write_is_the_first_to_find_a_restarted_node() -> None:
    address = f"127.0.0.1:{free_port()}"
    first = StoreProcess("--listen", address, "--capacity", "16MiB")
    try:
        with attnstore.connect(first.url, transport="tcp", deadline_ms=20_000) as client:
            batch = stored(client, 4, "restarted for a write")
            first.kill()
            with StoreProcess("--listen", address, "--capacity", "16MiB"):
                assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {STORED}
    finally:
        first.kill()


# A node drains


def test_a_drain_lets_a_running_read_end_whole(node: StoreProcess, last_client: attnstore.Client) -> None:
    batch = stored(last_client, 40, "drained", WIDE)
    buffers = batch.buffers()

    def on_layer(layer: int, _pages: int) -> None:
        if layer == 0:
            node.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: "draining" in node.log)

    result = last_client.read(batch.namespace, batch.hashes, buffers, on_layer=on_layer)
    assert (result.leading_hits, buffers) == (40, batch.pages)
    assert isinstance(read_back(last_client, batch).error, errors.Unavailable)
    assert node.process.wait(20) == 0


# Calls


def test_wrong_buffers_and_too_many_pages_are_refused_here(node: StoreProcess, last_client: attnstore.Client) -> None:
    batch = stored(last_client, 2, "refused here")
    node.kill()  # every later send fails with another error
    short = bytearray(SMALL.page_bytes - 1)
    for buffers in ([bytearray(SMALL.page_bytes), short], [bytearray(SMALL.page_bytes)], [b"read-only", b"bytes"]):
        with pytest.raises(errors.BufferMismatch):
            last_client.read(batch.namespace, batch.hashes, buffers)  # type: ignore[arg-type]
    with pytest.raises(errors.BufferMismatch):
        last_client.write(batch.namespace, batch.hashes, [batch.pages[0], batch.pages[1] + b"!"])
    many = [batch.hashes[0]] * (CHANNEL_READ_HASHES_MAX + 1)
    with pytest.raises(errors.InvalidArgument, match=str(CHANNEL_READ_HASHES_MAX)):
        last_client.read(batch.namespace, many, [bytearray(SMALL.page_bytes)] * len(many), on_layer=lambda _layer, _pages: None)


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_on_layer_may_call_the_client_and_means_the_same_on_every_transport(shared_node: StoreProcess, transport: str) -> None:
    with attnstore.connect(shared_node.url, transport=transport, deadline_ms=20_000) as client:
        batch = stored(client, 4, f"calls from on_layer over {transport}")
        client.delete(batch.namespace, [batch.hashes[2]])
        told: list[tuple[int, int, tuple[int, ...]]] = []

        def on_layer(layer: int, pages: int) -> None:
            told.append((layer, pages, client.match(batch.namespace, [batch.hashes]).hits))

        client.read(batch.namespace, batch.hashes, batch.buffers(), on_layer=on_layer)
        assert told == [(layer, 2, (2,)) for layer in range(SMALL.layers)]


def test_metadata_is_answered_while_pages_flow(shared_node: StoreProcess) -> None:
    with attnstore.connect(shared_node.url, transport="tcp", channels=2, deadline_ms=20_000) as client:
        batch = stored(client, 64, "metadata", WIDE)
        enough = threading.Event()

        def flow(_: int) -> int:
            rounds = 0
            while not enough.is_set():
                assert read_back(client, batch).leading_hits == 64
                rounds += 1
            return rounds

        with ThreadPoolExecutor(2) as threads:
            flowing = [threads.submit(flow, index) for index in range(2)]
            for _ in range(100):
                assert client.match(batch.namespace, [batch.hashes]).hits == (64,)
            enough.set()
            assert all(future.result(60) > 0 for future in flowing)


def test_many_callers_share_one_client(shared_node: StoreProcess) -> None:
    with attnstore.connect(shared_node.url, transport="tcp", channels=4, deadline_ms=20_000) as client:

        def work(index: int) -> int:
            batch = stored(client, 10, f"caller {index}")
            return sum(read_back(client, batch).leading_hits for _ in range(5))

        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(work, range(16))) == [50] * 16


# The end


def sockets() -> int:
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the directory's own
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_closed_client_leaves_no_thread_and_no_socket(shared_node: StoreProcess, channels: int) -> None:
    threads, before = set(threading.enumerate()), sockets()
    for _ in range(3):
        with attnstore.connect(shared_node.url, transport="tcp", channels=channels) as client:
            batch = make_batch(8, model="left behind")
            client.register_layout(batch.namespace, SMALL)
            client.write(batch.namespace, batch.hashes, batch.pages)
            assert read_back(client, batch).leading_hits == 8
    assert eventually(lambda: set(threading.enumerate()) <= threads)
    assert eventually(lambda: sockets() <= before)


async def test_an_asynchronous_client_leaves_no_socket(shared_node: StoreProcess) -> None:
    before = sockets()
    async with attnstore.aio.connect(shared_node.url, transport="tcp", channels=4) as client:
        batch = make_batch(8, model="left behind, asynchronous")
        await client.register_layout(batch.namespace, SMALL)
        await client.write(batch.namespace, batch.hashes, batch.pages)
        assert (await client.read(batch.namespace, batch.hashes, batch.buffers())).leading_hits == 8
    assert eventually(lambda: sockets() <= before)


def test_a_client_closed_by_another_thread_ends_its_calls(node: StoreProcess) -> None:
    client = attnstore.connect(node.url, transport="tcp", deadline_ms=20_000)
    batch = stored(client, 4, "closed meanwhile", WIDE)
    read_back(client, batch)
    node.suspend()
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(client.read, batch.namespace, batch.hashes, batch.buffers())
        writing = threads.submit(client.write, batch.namespace, batch.hashes, batch.pages)
        client.close()
        for call in (reading, writing):
            assert isinstance(call.exception(10), errors.ClientClosed)
    with pytest.raises(errors.ClientClosed):
        read_back(client, batch)


def test_a_stranger_at_the_bulk_port_costs_the_node_nothing(shared_node: StoreProcess, client: attnstore.Client) -> None:
    port, _token = open_channel(shared_node.address)
    strangers = [dial(port) for _ in range(5)]
    say_hello(strangers[0], os.urandom(32))
    strangers[1].send(os.urandom(4096))
    strangers[2].send(b"GET / HTTP/1.1\r\n\r\n")
    assert read_back(client, stored(client, 3, "strangers")).leading_hits == 3
    for stranger in strangers:
        stranger.close()
