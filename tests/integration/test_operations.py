"""The operator's view: health, reflection, metrics, logs and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

import attnstore
from attnstore import errors
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from attnstore.wire.messages import METHODS, SERVICE
from tests.samples import LARGE, SMALL, Batch, eventually

BatchOf = Callable[..., Batch]


@pytest.mark.parametrize("service", ["", SERVICE])
def test_the_health_service_answers(shared_node: StoreProcess, service: str) -> None:
    with grpc.insecure_channel(shared_node.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_the_whole_protocol(shared_node: StoreProcess) -> None:
    with grpc.insecure_channel(shared_node.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        service = DescriptorPool(database).FindServiceByName(SERVICE)
        assert {method.name for method in service.methods} == set(METHODS)


@pytest.fixture(params=["grpc", "tcp"])
def measured(request: pytest.FixtureRequest) -> Iterator[tuple[attnstore.Client, Callable[..., float | None]]]:
    """A client, and `value(metric, **labels)` of its node's metrics endpoint."""
    port = str(free_port())
    with StoreProcess("--capacity", "64MiB", "--metrics-port", port) as node:

        def value(name: str, **labels: str) -> float | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == name and sample.labels == labels:
                        return sample.value
            return None

        with attnstore.connect(node.url, transport=request.param) as client:
            yield client, value


def test_metrics_tell_exactly_what_happened(
    measured: tuple[attnstore.Client, Callable[..., float | None]], batch_of: BatchOf, request: pytest.FixtureRequest
) -> None:
    client, value = measured
    transport = request.node.callspec.params["measured"]
    batch = batch_of(3, LARGE)
    client.register_layout(batch.namespace, LARGE)
    client.write(batch.namespace, batch.hashes[:2], batch.pages[:2])
    client.write(batch.namespace, batch.hashes[:1], batch.pages[:1])
    client.match(batch.namespace, [batch.hashes], lease_ms=60_000)
    client.read(batch.namespace, batch.hashes, batch.buffers())
    with pytest.raises(errors.LayoutMismatch):
        client.register_layout(batch.namespace, SMALL)
    size = LARGE.page_bytes
    # Bytes are counted after they are sent, and the reader may have them a moment earlier.
    assert eventually(lambda: value("attnstore_sent_bytes_total", transport=transport) == 2 * size)
    assert eventually(lambda: value("attnstore_pages_total", rpc="Read", status="missing") == 1)
    for name, expected in (
        ("attnstore_capacity_bytes", 64 << 20),
        ("attnstore_used_bytes", 2 * size),
        ("attnstore_pages_sealed", 2),
        ("attnstore_pages_arriving", 0),
        ("attnstore_pages_pinned", 2),
        ("attnstore_leases", 1),
        ("attnstore_hit_pages_total", 2),
        ("attnstore_missed_pages_total", 1),
        ("attnstore_stored_pages_total", 2),
        ("attnstore_evicted_pages_total", 0),
    ):
        assert value(name) == expected, name
    assert value("attnstore_received_bytes_total", transport=transport) == 3 * size
    assert value("attnstore_pages_total", rpc="Match", status="ok") == 2
    assert value("attnstore_pages_total", rpc="Match", status="missing") == 1
    assert value("attnstore_rpc_total", rpc="Match", code="ok") == 1
    assert value("attnstore_rpc_total", rpc="RegisterLayout", code="ok") == 1
    assert value("attnstore_rpc_total", rpc="RegisterLayout", code="layout_mismatch") == 1
    assert value("attnstore_rpc_seconds_count", rpc="RegisterLayout") == 2
    assert value("attnstore_rpc_in_flight", rpc="Match") == 0
    for status, pages in (("ok", 2), ("missing", 1)):
        assert value("attnstore_pages_total", rpc="Read", status=status) == pages
    for status, pages in (("stored", 2), ("already_present", 1)):
        assert value("attnstore_pages_total", rpc="Write", status=status) == pages


def test_logs_are_one_json_object_a_line_where_asked() -> None:
    with StoreProcess("--capacity", "1MiB", "--log-format", "json", "--node-id", "ada") as node:
        with attnstore.connect(node.url) as client:
            assert client.describe().node_id == "ada"
        assert node.stop() == 0
    lines = [json.loads(line) for line in node.log.splitlines()]
    assert [line["event"] for line in lines] == ["serving", "draining", "stopped"]
    assert (lines[0]["address"], lines[0]["level"], lines[0]["capacity_bytes"]) == (node.address, "info", 1 << 20)


def test_quiet_logs_say_nothing_of_a_good_day() -> None:
    with StoreProcess("--capacity", "1MiB", "--log-level", "warning") as node:
        assert node.stop() == 0
    assert node.log == ""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attnstore.cli", *arguments], capture_output=True, text=True, timeout=30)


def test_the_command_explains_itself() -> None:
    assert run("--version").stdout.startswith("attnstore ")
    shown = run("serve", "--help").stdout
    for word in ("--listen", "ATTNSTORE_LISTEN", "127.0.0.1:7400", "--capacity", "2.0GiB", "--config"):
        assert word in shown
    assert run().returncode == 2
    assert run("serve", "--no-such-option").returncode == 2


def test_a_port_in_use_stops_the_start_and_names_the_option(shared_node: StoreProcess) -> None:
    taken = shared_node.address
    metrics = ("--listen", "127.0.0.1:0", "--metrics-port", taken.rpartition(":")[2])
    for option, arguments in ((f"--listen {taken}", ("--listen", taken)), ("--metrics-port", metrics)):
        result = run("serve", "--capacity", "1MiB", *arguments)
        assert result.returncode == 2
        assert option in result.stderr
        assert "Traceback" not in result.stderr


def test_a_node_listens_on_ipv6_loopback_too(batch_of: BatchOf) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    with StoreProcess("--listen", "[::1]:0", "--capacity", "1MiB") as node:
        assert node.address.startswith("[::1]:")
        batch = batch_of(1)
        for transport in ("grpc", "tcp"):
            with attnstore.connect(node.url, transport=transport) as client:
                client.register_layout(batch.namespace, SMALL)
                assert client.write(batch.namespace, batch.hashes, batch.pages).verdicts[0].is_kept
