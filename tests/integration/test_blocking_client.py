"""The blocking client with threads, interrupts, forks and closes: when a call has returned, none of its work continues."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import attnstore
import attnstore.aio
from attnstore import PageStatus, errors
from attnstore.testing import StoreProcess
from tests.samples import LARGE, SMALL, Batch, eventually

BatchOf = Callable[..., Batch]
transports = pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
LONG = 20_000
"""Pages of a read that would take minutes if it were not interrupted."""


@transports
def test_one_client_serves_many_threads(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    with attnstore.connect(shared_node.url, transport=transport) as client, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> bool:
            batch = batch_of(3, suffix=str(number))
            client.register_layout(batch.namespace, SMALL)
            for _ in range(5):
                client.write(batch.namespace, batch.hashes, batch.pages)
                buffers = batch.buffers()
                if client.read(batch.namespace, batch.hashes, buffers).leading_hits != 3 or buffers != batch.pages:
                    return False
                client.delete(batch.namespace, batch.hashes)
            return True

        assert all(pool.map(work, range(16)))


def test_clients_come_and_go_without_leaving_threads_or_descriptors(shared_node: StoreProcess) -> None:
    def open_and_close() -> None:
        with attnstore.connect(shared_node.url) as client:
            client.describe()

    open_and_close()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_and_close()
    assert "attnstore-client" not in {thread.name for thread in threading.enumerate()}
    assert threading.active_count() <= threads
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 5)


@transports
def test_closing_ends_the_calls_of_other_threads(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(1, LARGE)
    client = attnstore.connect(shared_node.url, transport=transport)
    client.register_layout(batch.namespace, LARGE)
    client.write(batch.namespace, batch.hashes, batch.pages)
    buffer = bytearray(LARGE.page_bytes)
    watch = client.watch(batch.namespace)
    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(client.read, batch.namespace, batch.hashes * LONG, [buffer] * LONG, deadline_ms=60_000)
        watching = pool.submit(next, watch)
        assert eventually(lambda: any(buffer[:64]))
        client.close()
        with pytest.raises(errors.ClientClosed):
            watching.result(10)
        try:
            answer = reading.result(10)
        except errors.ClientClosed:
            pass
        else:
            assert isinstance(answer.error, errors.Unavailable)
    buffer[:] = bytes(len(buffer))
    assert not any(buffer)
    client.close()


def test_a_call_that_cannot_be_begun_raises_and_the_next_one_is_made(shared_node: StoreProcess) -> None:
    def refuse(_loop: object, coroutine: Any, **_options: object) -> Any:
        coroutine.close()
        raise MemoryError

    with attnstore.connect(shared_node.url, transport="grpc") as client:
        loop = client._thread._loop
        loop.set_task_factory(refuse)
        with pytest.raises(MemoryError):
            client.describe()
        loop.set_task_factory(None)
        assert client.describe().tenant == "default"


@transports
def test_a_closed_client_says_so(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(1)
    client = attnstore.connect(shared_node.url, transport=transport)
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes, batch.pages)
    client.close()
    for call in (
        client.describe,
        client.stats,
        lambda: client.match(batch.namespace, [batch.hashes]),
        lambda: client.read(batch.namespace, batch.hashes, batch.buffers()),
        lambda: client.write(batch.namespace, batch.hashes, batch.pages),
        lambda: client.watch(batch.namespace),
    ):
        with pytest.raises(errors.ClientClosed, match="closed"):
            call()


@transports
async def test_a_closed_asynchronous_client_says_so(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(1, LARGE)
    client = attnstore.aio.connect(shared_node.url, transport=transport)
    await client.register_layout(batch.namespace, LARGE)
    await client.write(batch.namespace, batch.hashes, batch.pages)
    buffer = bytearray(LARGE.page_bytes)
    reading = asyncio.create_task(client.read(batch.namespace, batch.hashes * LONG, [buffer] * LONG, deadline_ms=60_000))
    while not any(buffer[:64]):
        await asyncio.sleep(0.01)
    await client.close()
    try:
        answer = await asyncio.wait_for(reading, 10)
    except errors.ClientClosed:
        pass
    else:
        assert isinstance(answer.error, errors.Unavailable)
    await client.close()
    with pytest.raises(errors.ClientClosed):
        await client.describe()


@transports
async def test_a_cancelled_read_writes_nothing_afterwards(shared_node: StoreProcess, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(1, LARGE)
    async with attnstore.aio.connect(shared_node.url, transport=transport) as client:
        await client.register_layout(batch.namespace, LARGE)
        await client.write(batch.namespace, batch.hashes, batch.pages)
        for _ in range(5):
            buffer = bytearray(LARGE.page_bytes)
            reading = asyncio.create_task(client.read(batch.namespace, batch.hashes * LONG, [buffer] * LONG, deadline_ms=60_000))
            while not any(buffer[:64]):
                await asyncio.sleep(0.001)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            buffer[:] = bytes(len(buffer))
            await asyncio.sleep(0.02)
            assert not any(buffer)
        # The client still works.
        buffers = batch.buffers()
        assert (await client.read(batch.namespace, batch.hashes, buffers)).leading_hits == 1
        assert buffers == batch.pages


INTERRUPTED = """
import os, signal, sys, threading, time
import attnstore
from tests.samples import LARGE, make_batch
url, transport = sys.argv[1:]
batch = make_batch(1, model="interrupted " + transport, layout=LARGE)
with attnstore.connect(url, deadline_ms=60_000, transport=transport) as client:
    client.register_layout(batch.namespace, LARGE)
    client.write(batch.namespace, batch.hashes, batch.pages)
    for _ in range(5):
        buffer = bytearray(LARGE.page_bytes)
        def interrupt():
            while not any(buffer[:64]):
                time.sleep(0.001)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            client.read(batch.namespace, batch.hashes * 20_000, [buffer] * 20_000)
            sys.exit("the read was not interrupted")
        except KeyboardInterrupt:
            pass
        # The second and third interrupt may come only now.
        try:
            buffer[:] = bytes(len(buffer))
            time.sleep(0.05)
        except KeyboardInterrupt:
            buffer[:] = bytes(len(buffer))
            time.sleep(0.05)
        if any(buffer):
            sys.exit("bytes arrived after the call had ended")
    buffers = batch.buffers()
    assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == 1 and buffers == batch.pages
print("well")
"""


@transports
def test_an_interrupted_read_writes_nothing_afterwards(shared_node: StoreProcess, transport: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, shared_node.url, transport], capture_output=True, text=True, timeout=60
    )
    assert child.stdout == "well\n", child.stderr


FORKED = """
import os, signal, sys
import attnstore
from attnstore import errors
from tests.samples import SMALL, make_batch
url, transport = sys.argv[1:]
batch = make_batch(1, model="forked", layout=SMALL)
client = attnstore.connect(url, deadline_ms=5_000, transport=transport)
client.register_layout(batch.namespace, SMALL)
client.write(batch.namespace, batch.hashes, batch.pages)
child = os.fork()
if child == 0:
    signal.alarm(20)
    for call in (client.describe, lambda: client.read(batch.namespace, batch.hashes, batch.buffers())):
        try:
            call()
            os._exit(1)
        except errors.ClientClosed as error:
            if "fork" not in str(error):
                os._exit(2)
    client.close()
    # Nor can gRPC itself go on here; that is said at once instead of waited for.
    other = attnstore.connect(url, deadline_ms=5_000, transport=transport)
    try:
        other.describe()
        os._exit(3)
    except errors.ClientClosed as error:
        if "spawn" not in str(error):
            os._exit(4)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert client.describe().node_id, "the parent's client goes on"
client.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@transports
def test_a_forked_child_is_told_that_clients_do_not_survive_a_fork(shared_node: StoreProcess, transport: str) -> None:
    child = subprocess.run([sys.executable, "-c", FORKED, shared_node.url, transport], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr


def _describe(url: str, done: multiprocessing.Queue[str]) -> None:
    with attnstore.connect(url, deadline_ms=5_000) as client:
        done.put(client.describe().node_id)


def test_a_spawned_child_connects_for_itself(shared_node: StoreProcess) -> None:
    spawn = multiprocessing.get_context("spawn")
    done: multiprocessing.Queue[str] = spawn.Queue()
    with attnstore.connect(shared_node.url) as client:
        assert client.describe().node_id == shared_node.address
        child = spawn.Process(target=_describe, args=(shared_node.url, done))
        child.start()
        assert done.get(timeout=30) == shared_node.address
        child.join(10)
    assert child.exitcode == 0
    done.close()


def test_both_kinds_of_client_live_in_one_process(shared_node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(2)
    on_interrupt = signal.getsignal(signal.SIGINT)

    async def asynchronous() -> PageStatus:
        async with attnstore.aio.connect(shared_node.url) as other:
            await other.register_layout(batch.namespace, SMALL)
            return (await other.read(batch.namespace, batch.hashes, batch.buffers())).statuses[0]

    with attnstore.connect(shared_node.url) as client:
        client.register_layout(batch.namespace, SMALL)
        client.write(batch.namespace, batch.hashes, batch.pages)
        assert asyncio.run(asynchronous()) is PageStatus.OK
        assert client.describe().node_id == shared_node.address
    assert signal.getsignal(signal.SIGINT) is on_interrupt
