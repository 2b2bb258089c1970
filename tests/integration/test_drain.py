"""SIGTERM: what runs may finish, nothing new begins, watchers are sent away, and the exit status is 0."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import attnstore
from attnstore import errors
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
        with attnstore.connect(node.url) as newcomer, pytest.raises(errors.Unavailable):
            newcomer.describe()
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
