"""Who may talk to a node, and that a tenant learns nothing about another."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

import attnstore
from attnstore import PageStatus, errors
from attnstore.testing import StoreProcess
from attnstore.types import MatchResult
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.samples import SMALL, Batch, deleted_after_reading

BatchOf = Callable[..., Batch]


def tls_options(folder: Path) -> tuple[str, ...]:
    return ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))


def round_trip(client: attnstore.Client, batch: Batch) -> bool:
    client.register_layout(batch.namespace, SMALL)
    client.write(batch.namespace, batch.hashes, batch.pages)
    buffers = batch.buffers()
    return client.read(batch.namespace, batch.hashes, buffers).leading_hits == len(buffers) and buffers == batch.pages


def test_tls_carries_pages_for_those_who_trust_the_certificate(certificates: Path, batch_of: BatchOf) -> None:
    with StoreProcess("--capacity", "1MiB", *tls_options(certificates)) as node:
        secure = f"grpcs://{node.address}"
        with attnstore.connect(secure, tls_ca=certificates / "cert.pem") as client:
            assert round_trip(client, batch_of(2))
        wary = attnstore.connect(secure, tls_ca=certificates / "other.pem", deadline_ms=3_000)
        with wary as client, pytest.raises(errors.Unavailable):
            client.describe()
        with attnstore.connect(node.url, deadline_ms=3_000) as client, pytest.raises(errors.Retryable):
            client.describe()


def test_a_node_asks_for_its_token(batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(2)
    with StoreProcess("--capacity", "1MiB", "--token", "s3cret") as node:
        for token, message in ((None, "asks for a token"), ("wrong", "not one of"), ("s3cret2", "not one of")):
            with attnstore.connect(node.url, token=token) as client:
                for call in (client.describe, client.stats, lambda: client.register_layout(batch.namespace, SMALL)):
                    with pytest.raises(errors.Unauthenticated, match=message):
                        call()
        for transport in ("grpc", "tcp"):
            with attnstore.connect(node.url, token="s3cret", transport=transport) as client:
                assert round_trip(client, batch)
        monkeypatch.setenv("ATTNSTORE_TOKEN", "s3cret")
        with attnstore.connect(node.url) as client:
            assert client.describe().node_id == node.address
        assert "s3cret" not in node.log


def test_a_malformed_authorization_is_refused() -> None:
    with StoreProcess("--capacity", "1MiB", "--token", "s3cret") as node, grpc.insecure_channel(node.address) as channel:
        stub = store_pb2_grpc.AttentionStoreStub(channel)
        for authorization in ("s3cret", "Basic s3cret", "bearer s3cret", "Bearer ", "Bearer  s3cret"):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Describe(pb.DescribeRequest(), metadata=(("authorization", authorization),), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def tenants_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text('ada = "token-of-ada"\nbob = "token-of-bob"\n')
    return path


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_two_tenants_of_one_model_each_have_hits_of_their_own(tenants_file: Path, batch_of: BatchOf, transport: str) -> None:
    adas = batch_of(2, suffix=transport)
    bobs = replace(adas, pages=[bytes(reversed(page)) for page in adas.pages])
    with (
        StoreProcess("--capacity", "16MiB", "--tokens-file", str(tenants_file)) as node,
        attnstore.connect(node.url, token="token-of-ada", transport=transport) as ada,
        attnstore.connect(node.url, token="token-of-bob", transport=transport) as bob,
    ):
        assert round_trip(ada, adas)
        bob.register_layout(bobs.namespace, SMALL)
        watched = bob.watch(bobs.namespace, deadline_ms=20_000)
        assert bob.match(bobs.namespace, [bobs.hashes], lease_ms=1_000) == MatchResult((0,), None)
        assert bob.delete(bobs.namespace, bobs.hashes) == (PageStatus.MISSING,) * 2
        assert round_trip(bob, bobs)
        lease = ada.match(adas.namespace, [adas.hashes], lease_ms=60_000).lease
        assert lease is not None
        with pytest.raises(errors.LeaseExpired):
            bob.renew(lease, 60_000)
        assert not bob.release(lease)
        assert bob.read(bobs.namespace, bobs.hashes, bobs.buffers(), lease=lease).statuses == (PageStatus.LEASE_EXPIRED,) * 2
        assert deleted_after_reading(bob, bobs.namespace, bobs.hashes) == (PageStatus.OK,) * 2
        assert round_trip(ada, adas)
        assert ada.release(lease)
        assert [next(watched).kind.name for _ in range(4)] == ["SEALED", "SEALED", "DELETED", "DELETED"]
        assert (ada.describe().tenant, bob.describe().tenant) == ("ada", "bob")


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_nothing_of_one_tenant_is_reachable_by_another(tenants_file: Path, batch_of: BatchOf, transport: str) -> None:
    batch, other = batch_of(2), batch_of(2, suffix="other")
    with (
        StoreProcess("--capacity", "4MiB", "--tokens-file", str(tenants_file)) as node,
        attnstore.connect(node.url, token="token-of-ada", transport=transport) as ada,
        attnstore.connect(node.url, token="token-of-bob", transport=transport) as bob,
    ):
        assert round_trip(ada, batch)
        assert round_trip(bob, other)
        buffers = batch.buffers()
        # A hash identifies a page only within its namespace.
        assert bob.match(other.namespace, [batch.hashes]).hits == (0,)
        assert bob.read(other.namespace, batch.hashes, buffers).statuses == (PageStatus.MISSING,) * 2
        assert buffers == [bytes(SMALL.page_bytes)] * 2
        assert [space.namespace for space in ada.stats().namespaces] == [batch.namespace]
        assert [space.namespace for space in bob.stats().namespaces] == [other.namespace]


def refused(*options: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(RuntimeError) as caught:
        StoreProcess(*options, environment=environment)
    return str(caught.value)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "203.0.113.7:0", "example.org:0"])
def test_a_public_address_needs_a_guard_or_a_word(listen: str) -> None:
    message = refused("--listen", listen)
    for option in (f"--listen {listen}", "--token", "--tokens-file", "--insecure"):
        assert option in message


def test_tls_alone_guards_no_public_address(certificates: Path) -> None:
    assert "--token" in refused("--listen", "0.0.0.0:0", *tls_options(certificates))


def test_a_guarded_or_insecure_public_address_is_served(certificates: Path) -> None:
    for options in (("--insecure",), ("--token", "s3cret"), ("--token", "s3cret", *tls_options(certificates))):
        with StoreProcess("--listen", "0.0.0.0:0", "--capacity", "1MiB", *options) as node:
            port = int(node.address.rpartition(":")[2])
            socket.create_connection(("127.0.0.1", port), 5).close()


def test_certificates_that_do_not_work_stop_the_start(certificates: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    for cert, key in (
        (garbage, certificates / "key.pem"),
        (certificates / "cert.pem", garbage),
        (certificates / "cert.pem", certificates / "other-key.pem"),
    ):
        message = refused("--tls-cert", str(cert), "--tls-key", str(key))
        assert f"--tls-cert {cert}" in message
        assert f"--tls-key {key}" in message
        assert "Traceback" not in message
    absent = tmp_path / "absent.pem"
    message = refused("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(absent))
    assert f"--tls-key (command line): '{absent}' cannot be read" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "content", ["", "ada = 1", 'ada = ""', 'ada = "a b"', 'ada = "x"\nbob = "x"', "ada", '[team]\nada = "x"'], ids=repr
)
def test_a_tokens_file_that_says_nothing_clear_stops_the_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    assert f"--tokens-file {path}" in refused("--tokens-file", str(path))
