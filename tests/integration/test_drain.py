"""SIGTERM: running calls may finish, no new call begins, watchers are ended, and the exit status is 0."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import attnstore
from attnstore import errors
from attnstore.limits import ATTEND_ROWS_MAX, LEASE_MS_MAX
from attnstore.testing import StoreProcess
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.samples import LARGE, SMALL, Batch, eventually

BatchOf = Callable[..., Batch]


def begin_drain(node: StoreProcess, number: signal.Signals = signal.SIGTERM) -> None:
    node.process.send_signal(number)
    assert eventually(lambda: "draining" in node.log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_read_finishes_while_new_calls_are_turned_away(
    node: StoreProcess, batch_of: BatchOf, number: signal.Signals
) -> None:
    batch = batch_of(8, LARGE)
    with attnstore.connect(node.url) as client, grpc.insecure_channel(node.address) as channel:
        client.register_layout(batch.namespace, LARGE)
        client.write(batch.namespace, batch.hashes, batch.pages)
        request = pb.ReadRequest(namespace=batch.namespace, hashes=b"".join(batch.hashes))
        stream = store_pb2_grpc.AttentionStoreStub(channel).Read(request, timeout=20)
        pages = [bytearray() for _ in batch.pages]
        pages[0] += next(stream).payload
        begin_drain(node, number)
        assert eventually(lambda: _is_unavailable(client.describe))
        with attnstore.connect(node.url) as client, pytest.raises(errors.Unavailable):
            client.describe()
        for chunk in stream:
            pages[chunk.page_index] += chunk.payload
        assert pages == batch.pages
    assert node.process.wait(10) == 0
    assert "stopped" in node.log


def _is_unavailable(call: Callable[[], object]) -> bool:
    try:
        call()
    except errors.Unavailable:
        return True
    return False


def test_watchers_are_sent_away_at_once(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    with attnstore.connect(node.url) as client, ThreadPoolExecutor(1) as pool:
        client.register_layout(batch.namespace, SMALL)
        watch = client.watch(batch.namespace)
        waiting = pool.submit(next, watch)
        node.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Unavailable, match="draining"):
            waiting.result(10)
    assert node.process.wait(5) == 0


def test_a_call_that_outlives_the_drain_is_cut_off(batch_of: BatchOf) -> None:
    batch = batch_of(8, LARGE)
    with StoreProcess("--capacity", "64MiB", "--drain-ms", "300") as node:
        with attnstore.connect(node.url) as client, grpc.insecure_channel(node.address) as channel:
            client.register_layout(batch.namespace, LARGE)
            client.write(batch.namespace, batch.hashes, batch.pages)
            request = pb.ReadRequest(namespace=batch.namespace, hashes=b"".join(batch.hashes))
            stream = store_pb2_grpc.AttentionStoreStub(channel).Read(request, timeout=20)
            next(stream)
            began_s = time.monotonic()
            assert node.stop() == 0
            assert time.monotonic() - began_s < 0.3 + 2
            with pytest.raises(grpc.RpcError):
                list(stream)
        assert "Traceback" not in node.log


def test_health_turns_to_not_serving(node: StoreProcess) -> None:
    with grpc.insecure_channel(node.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        node.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    assert node.process.wait(10) == 0


def test_an_idle_node_stops_at_once(node: StoreProcess) -> None:
    began_s = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - began_s < 3


def test_a_socket_folder_that_is_gone_does_not_keep_the_node_from_its_end(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        address = Path(client.describe().transports["shm"])
    shutil.rmtree(address.parent)
    assert node.stop() == 0
    assert "stopped" in node.log
    assert "Traceback" not in node.log


def test_queries_that_compute_for_long_do_not_hold_up_the_end(batch_of: BatchOf) -> None:
    layout = attnstore.PageLayout(layers=1, kv_heads=1, head_dim=64, block_tokens=1_024, dtype=attnstore.DType.FP32)
    batch = batch_of(256, layout)
    rows = bytes(ATTEND_ROWS_MAX * layout.head_dim * 4)
    with (
        StoreProcess("--capacity", "192MiB", "--attend-threads", "1", "--drain-ms", "300") as node,
        attnstore.connect(node.url, transport="grpc", deadline_ms=120_000) as client,
        ExitStack() as streams,
    ):
        client.register_layout(batch.namespace, layout)
        client.write(batch.namespace, batch.hashes, batch.pages)
        lease = client.match(batch.namespace, [batch.hashes], lease_ms=LEASE_MS_MAX).lease
        assert lease is not None
        for _ in range(12):
            stream = streams.enter_context(client.attend(batch.namespace, q_heads=1, scale=1.0))
            stream.ask(0, [(stream.open(batch.hashes, lease), ATTEND_ROWS_MAX)], rows)
        # The process would be killed, and the status would say so, if it were not gone half a minute after the signal.
        assert node.stop() == 0
        assert "stopped" in node.log
