"""Pages written through memory lent to a real node: bytes and verdicts, and peers that disappear meanwhile."""

from __future__ import annotations

import asyncio
import errno
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

import attnstore
import attnstore.aio
from attnstore import DType, PageLayout, PageStatus, memory_files
from attnstore.errors import (
    Retryable,
    Unavailable,
)
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from tests.integration.shm_writing import assert_holds, registered, used_bytes
from tests.samples import LARGE, SMALL, deleted_after_reading, eventually, make_batch

STORED, PRESENT, NO_SPACE = PageStatus.STORED, PageStatus.ALREADY_PRESENT, PageStatus.NO_SPACE
ODD = PageLayout(layers=3, kv_heads=1, head_dim=333, block_tokens=1, dtype=DType.OPAQUE)
"""1,998 bytes per page: not a multiple of a cache line."""


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "256MiB", "--stall-ms", "1000") as node:
        yield node


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pages", "layout"), [(1, SMALL), (40, LARGE), (3_000, SMALL), (500, ODD)], ids=["one", "large", "many small", "odd"]
)
def test_what_is_written_is_what_others_read(node: StoreProcess, pages: int, layout: PageLayout, channels: int) -> None:
    with attnstore.connect(node.url, transport="shm", channels=channels) as client:
        batch = registered(client, pages, f"written {pages} {layout.page_bytes} {channels}", layout)
        result = client.write(batch.namespace, batch.hashes, batch.pages)
        assert result.verdicts == (STORED,) * pages
        assert result.bytes_written == pages * layout.page_bytes
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (PRESENT,) * pages
        assert_holds(node, batch)
        client.delete(batch.namespace, batch.hashes)


def test_one_connection_serves_pages_of_several_sizes_in_turn(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batches = [registered(client, 4, f"sizes {number}", layout) for number, layout in enumerate((SMALL, LARGE, ODD) * 2)]
        for batch in batches:
            assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 4
        for batch in batches:
            assert_holds(node, batch)


def test_writing_nothing_is_nothing(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 1, "nothing")
        assert client.write(batch.namespace, [], []).verdicts == ()


def test_an_async_client_writes_so_too(node: StoreProcess) -> None:
    async def write() -> tuple[PageStatus, ...]:
        async with attnstore.aio.connect(node.url, transport="shm") as client:
            await client.register_layout(batch.namespace, batch.layout)
            return (await client.write(batch.namespace, batch.hashes, batch.pages)).verdicts

    batch = make_batch(5, model="async writer", layout=LARGE)
    assert asyncio.run(write()) == (STORED,) * 5
    assert_holds(node, batch)


def test_auto_writes_through_shared_memory_on_one_host_and_counts_it() -> None:
    port = free_port()
    with StoreProcess("--capacity", "16MiB", "--metrics-port", str(port)) as node, attnstore.connect(node.url) as client:
        batch = registered(client, 7, "auto")
        client.write(batch.namespace, batch.hashes, batch.pages)

        def counted() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                lines = answer.read().decode().splitlines()
            return (
                f'attnstore_received_bytes_total{{transport="shm"}} {7 * SMALL.page_bytes:.1f}' in lines
                and 'attnstore_pages_total{rpc="Write",status="stored"} 7.0' in lines
            )

        assert eventually(counted)


def test_a_node_that_is_full_of_leased_pages_says_so_for_each_page() -> None:
    with StoreProcess("--capacity", "1MiB") as node, attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 258, "full")
        fitting, others = slice(0, 256), slice(255, 258)
        assert client.write(batch.namespace, batch.hashes[fitting], batch.pages[fitting]).verdicts == (STORED,) * 256
        assert client.lease(batch.namespace, batch.hashes[fitting], 600_000)[0] == 256
        verdicts = client.write(batch.namespace, batch.hashes[others], batch.pages[others]).verdicts
        assert verdicts == (PRESENT, NO_SPACE, NO_SPACE)
        buffers = batch.buffers()
        assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 256
        assert buffers[fitting] == batch.pages[fitting]


def test_a_namespace_that_the_node_forgot_is_registered_again() -> None:
    with StoreProcess("--capacity", "4MiB") as first:
        address = first.address
        with attnstore.connect(first.url, transport="shm") as client:
            batch = registered(client, 5, "forgotten")
            client.write(batch.namespace, batch.hashes, batch.pages)
            first.kill()
            with StoreProcess("--capacity", "4MiB", "--listen", address) as second:
                assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 5
                assert_holds(second, batch)


def test_a_writer_that_is_killed_leaves_whole_pages_and_no_slot_taken() -> None:
    with StoreProcess("--capacity", "64MiB") as node:
        for milliseconds in (50, 80, 110):
            kill_a_writer(node, milliseconds)
        batch = make_batch(8, model="killed writer", layout=LARGE)
        with attnstore.connect(node.url, transport="tcp") as client:
            client.register_layout(batch.namespace, LARGE)

            def nothing_arrives() -> bool:
                return PageStatus.ARRIVING not in client.write(batch.namespace, batch.hashes, batch.pages).verdicts

            assert eventually(nothing_arrives)
            assert_holds(node, batch)
            assert set(deleted_after_reading(client, batch.namespace, batch.hashes)) == {PageStatus.OK}
        assert used_bytes(node) == 0


def kill_a_writer(node: StoreProcess, milliseconds: int) -> None:
    """Kills it during its writes."""
    script = (
        "import attnstore, sys\n"
        "from tests.samples import LARGE, make_batch\n"
        "client = attnstore.connect(sys.argv[1], transport='shm')\n"
        "batch = make_batch(8, model='killed writer', layout=LARGE)\n"
        "client.register_layout(batch.namespace, LARGE)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    client.write(batch.namespace, batch.hashes, batch.pages)\n"
        "    client.delete(batch.namespace, batch.hashes)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, node.url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(milliseconds / 1000)
    writer.kill()
    writer.wait()
    writer.stdout.close()


def test_a_node_that_is_killed_ends_a_write_in_time() -> None:
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url, transport="shm", deadline_ms=3_000) as client:
        batch = registered(client, 20, "killed node", LARGE)
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        killer = threading.Timer(0.02, node.kill)
        killer.start()
        began_s = time.monotonic()
        with pytest.raises(Retryable):  # noqa: PT012 - whichever call finds the node dead
            while True:
                client.write(batch.namespace, batch.hashes, batch.pages)
                client.delete(batch.namespace, batch.hashes)
        assert time.monotonic() - began_s < 6
        killer.join()


def test_a_stopped_node_ends_a_write_at_its_deadline_and_takes_later_ones(node: StoreProcess) -> None:
    with attnstore.connect(node.url, transport="shm") as client:
        batch = registered(client, 6, "stopped", LARGE)
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        node.suspend()
        try:
            began_s = time.monotonic()
            with pytest.raises(Retryable):
                client.write(batch.namespace, batch.hashes, batch.pages, deadline_ms=500)
            assert time.monotonic() - began_s < 2.5
        finally:
            node.resume()
        # The node may finish or drop the rest of the broken call; either way each page is whole.
        assert eventually(lambda: all(v.is_kept for v in client.write(batch.namespace, batch.hashes, batch.pages).verdicts))
        assert_holds(node, batch)


def test_a_cancelled_write_ends_and_its_connection_serves_nobody_else(node: StoreProcess) -> None:
    async def run() -> None:
        async with attnstore.aio.connect(node.url, transport="shm") as client:
            await client.register_layout(batch.namespace, LARGE)
            await client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
            node.suspend()
            try:
                writing = asyncio.create_task(client.write(batch.namespace, batch.hashes, batch.pages))
                await asyncio.sleep(0.2)
                writing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(writing, 5)
            finally:
                node.resume()
            for _ in range(50):
                verdicts = (await client.write(batch.namespace, batch.hashes, batch.pages)).verdicts
                if all(verdict.is_kept for verdict in verdicts):
                    return
                await asyncio.sleep(0.1)
        raise AssertionError("the node never took the pages")

    batch = make_batch(6, model="cancelled", layout=LARGE)
    asyncio.run(run())
    assert_holds(node, batch)


def test_without_memory_to_lend_auto_writes_over_tcp_and_forced_shm_says_why(
    node: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, size_bytes: int) -> object:
        raise OSError(errno.ENOMEM, f"no memory for {name} of {size_bytes}")

    monkeypatch.setattr(memory_files, "create", refuse)
    with attnstore.connect(node.url) as client:
        batch = registered(client, 2, "no memory")
        assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts == (STORED,) * 2
    with attnstore.connect(node.url, transport="shm") as client:
        other = registered(client, 1, "no memory, forced")
        with pytest.raises(Unavailable, match="no memory"):
            client.write(other.namespace, other.hashes, other.pages)
    assert_holds(node, batch)


def test_a_node_that_has_drained_takes_no_page() -> None:
    with (
        StoreProcess("--capacity", "16MiB", "--drain-ms", "60000") as node,
        attnstore.connect(node.url, transport="shm", deadline_ms=2_000) as client,
    ):
        batch = registered(client, 2, "draining")
        client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(20) == 0
        with pytest.raises(Unavailable):
            client.write(batch.namespace, batch.hashes, batch.pages)
