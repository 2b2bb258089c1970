"""Peers that connect and send nothing, to every port of a node with few file descriptors: it continues to serve others."""

from __future__ import annotations

import os
import queue
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import attnstore
from attnstore.limits import CONNECT_MS_MAX, DESCRIPTORS_BESIDE_ARENA_MIN, OPEN_STREAMS_MAX
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from tests.channels import open_channel
from tests.integration.shm_peer import open_channel as open_shm
from tests.samples import eventually, make_batch

SILENT = 1_100
_STREAM_S_MAX = 60.0
ARENA_DESCRIPTORS = 16
DESCRIPTORS = DESCRIPTORS_BESIDE_ARENA_MIN + ARENA_DESCRIPTORS

Connect = Callable[[], socket.socket]

_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def limited_to(descriptors: int) -> tuple[str, ...]:
    """Returns a command that runs another one with a low soft limit of descriptors and the given hard limit."""
    return (sys.executable, "-c", _LIMITED, str(descriptors))


class Node:
    """A node with the minimum number of descriptors, its clients and a reader of its metrics."""

    def __init__(self) -> None:
        self.metrics_port = free_port()
        options = ("--capacity", "32MiB", "--metrics-port", str(self.metrics_port))
        self.process = StoreProcess(*options, under=limited_to(DESCRIPTORS))

    def serves(self, transport: str) -> bool:
        batch = make_batch(2, model=f"beside silence, over {transport}")
        with attnstore.connect(self.process.url, transport=transport, deadline_ms=2_000) as client:
            try:
                client.register_layout(batch.namespace, batch.layout)
                client.write(batch.namespace, batch.hashes, batch.pages)
                buffers = batch.buffers()
                return client.read(batch.namespace, batch.hashes, buffers).transport == transport and buffers == batch.pages
            except attnstore.errors.Retryable:
                return False

    def shows_metrics(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as answer:
            return b"attnstore_capacity_bytes" in answer.read()

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.process.pid}/task"))

    def connects(self, where: str) -> Connect:
        """Returns a function that connects to a port of the node."""
        if where == "shm":
            path, _ = open_shm(self.process)
            return lambda: unix(path)
        host, grpc_port = self.process.address.split(":")
        port = {"grpc": int(grpc_port), "metrics": self.metrics_port}.get(where) or open_channel(self.process.address)[0]
        return lambda: socket.create_connection((host, port), 20)


def unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    while True:
        try:
            connection.connect(path)
            return connection
        except BlockingIOError:  # the kernel queues no more connections for the node
            continue


@pytest.fixture
def small_node() -> Iterator[Node]:
    node = Node()
    yield node
    node.process.stop()


@pytest.mark.parametrize("where", ["grpc", "tcp", "shm", "metrics"])
def test_silent_connections_stop_nothing(small_node: Node, where: str) -> None:
    threads = small_node.threads()
    connect = small_node.connects(where)
    silent = []
    try:
        for _ in range(SILENT):
            silent.append(connect())
        assert small_node.threads() < threads + 100
        for transport in ("grpc", "tcp", "shm"):
            # Connections silent for CONNECT_MS_MAX are closed; until then a full port refuses.
            assert eventually(lambda transport=transport: small_node.serves(transport), 4 * CONNECT_MS_MAX / 1000)
        assert small_node.shows_metrics()
    finally:
        for connection in silent:
            connection.close()


def test_services_that_ask_for_no_token_hold_few_streams_and_the_oldest_gives_way(small_node: Node) -> None:
    with grpc.insecure_channel(small_node.process.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def watch() -> Any:
            """Returns a stream that has begun, so that the next one is newer."""
            stream = health.Watch(health_pb2.HealthCheckRequest(), timeout=_STREAM_S_MAX)
            assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
            return stream

        watches = [watch() for _ in range(OPEN_STREAMS_MAX)]
        questions: queue.SimpleQueue[reflection_pb2.ServerReflectionRequest | None] = queue.SimpleQueue()
        questions.put(reflection_pb2.ServerReflectionRequest(list_services=""))
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        answers = reflection.ServerReflectionInfo(iter(questions.get, None), timeout=_STREAM_S_MAX)
        assert "attnstore.v1.AttentionStore" in [service.name for service in next(answers).list_services_response.service]
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            next(watches[0])
        watches += [watch() for _ in range(OPEN_STREAMS_MAX)]
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            next(answers)
        questions.put(None)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING


def test_a_node_that_may_have_too_few_descriptors_says_how_many_it_needs() -> None:
    with pytest.raises(RuntimeError, match=f"needs {DESCRIPTORS} file descriptors, {ARENA_DESCRIPTORS} of them for its arena"):
        StoreProcess("--capacity", "32MiB", under=limited_to(DESCRIPTORS - 1))
