"""Proxies: no transport uses a proxy that only the environment names, and every transport uses a proxy that is given explicitly."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

import attnstore
from attnstore.errors import InvalidArgument
from attnstore.testing import RedisServer, StoreProcess
from attnstore.worker_status import worker_statuses
from tests.samples import SMALL, Batch, eventually

BatchOf = Callable[..., Batch]


class Proxy:
    """An HTTP proxy on loopback that records its requests: CONNECT opens a tunnel, any other request is answered with `body`."""

    def __init__(self, body: bytes = b"{}") -> None:
        self._body = body
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def variables(self) -> dict[str, str]:
        """Returns every way to name the proxy in an environment, without exceptions from it."""
        names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
        named = {name: self.url for name in (*names, *map(str.upper, names))}
        return {**named, "no_proxy": "", "NO_PROXY": "", "no_grpc_proxy": ""}

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (part := connection.recv(4096)):
                head += part
            method, _, rest = head.decode("latin-1").partition(" ")
            wanted = rest.partition(" ")[0]
            self.asked.append(f"{method} {wanted}")
            if method != "CONNECT":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(self._body), self._body))
                return
            host, _, port = wanted.rpartition(":")
            with socket.create_connection((host, int(port))) as target:
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pump, args=(target, connection), daemon=True)
                back.start()
                _pump(connection, target)
                back.join(10)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.fixture
def behind_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """Names the proxy in the environment of this process and of those that it starts."""
    for name, value in proxy.variables().items():
        monkeypatch.setenv(name, value)
    return proxy


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm", "auto"])
def test_no_transport_goes_through_the_environments_proxy(behind_proxy: Proxy, batch_of: BatchOf, transport: str) -> None:
    batch = batch_of(4)
    with StoreProcess("--capacity", "1MiB") as node, attnstore.connect(node.url, transport=transport) as client:
        client.register_layout(batch.namespace, SMALL)
        client.write(batch.namespace, batch.hashes, batch.pages)
        assert client.match(batch.namespace, [batch.hashes]).hits == (4,)
        assert client.read(batch.namespace, batch.hashes, batch.buffers()).leading_hits == 4
    assert behind_proxy.asked == []


def test_tls_does_not_go_through_the_environments_proxy(behind_proxy: Proxy, certificates: os.PathLike[str]) -> None:
    cert, key = os.path.join(certificates, "cert.pem"), os.path.join(certificates, "key.pem")
    with StoreProcess("--capacity", "1MiB", "--tls-cert", cert, "--tls-key", key) as node:
        url = node.url.replace("grpc://", "grpcs://")
        with attnstore.connect(url, tls_ca=cert) as client:
            assert client.describe().capacity_bytes == 1 << 20
        assert command("health", url, "--tls-ca", cert) == (0, "")
    assert behind_proxy.asked == []


def test_neither_do_the_commands(behind_proxy: Proxy) -> None:
    with StoreProcess("--capacity", "1MiB") as node:
        assert command("health", node.url) == (0, "")
        assert command("status", node.url) == (0, "")
        status, said = command("status", node.url, "--worker", "http://127.0.0.1:1")
    assert status == 1
    assert "http://127.0.0.1:1 did not answer" in said
    assert behind_proxy.asked == []


@pytest.mark.redis
def test_neither_do_nodes_that_hand_pages_over_nor_clients_of_a_cluster(behind_proxy: Proxy, batch_of: BatchOf) -> None:
    batch = batch_of(4)
    with RedisServer() as directory:
        member = ("--capacity", "1MiB", "--directory", directory.url)
        with StoreProcess(*member, "--node-id", "ada") as ada, attnstore.connect(directory.url) as client:
            assert eventually(lambda: '"ada"' in status_of(directory.url), 20)
            client.register_layout(batch.namespace, SMALL)
            client.write(batch.namespace, batch.hashes, batch.pages)
            with StoreProcess(*member, "--node-id", "bob") as bob:
                assert eventually(lambda: '"bob"' in status_of(directory.url), 20)
                assert command("drain", "ada", "--wait", "60", "--directory", directory.url) == (0, "")
                ada.stop()
                with attnstore.connect(bob.url) as second:
                    assert second.match(batch.namespace, [batch.hashes]).hits == (4,)
    assert behind_proxy.asked == []


def test_a_proxy_that_is_asked_for_carries_grpc(proxy: Proxy, batch_of: BatchOf) -> None:
    batch = batch_of(4)
    with StoreProcess("--capacity", "1MiB") as node:
        with attnstore.connect(node.url, http_proxy=proxy.url) as client:
            client.register_layout(batch.namespace, SMALL)
            client.write(batch.namespace, batch.hashes, batch.pages)
            read = client.read(batch.namespace, batch.hashes, batch.buffers())
        assert (read.leading_hits, read.transport) == (4, "grpc")
        assert proxy.asked
        twice = f"{node.url},{node.address.replace('127.0.0.1', 'localhost')}"
        for arguments, asked in ((("health", node.url), 1), (("status", node.url), 1), (("status", twice), 2)):
            proxy.asked.clear()
            assert command(*arguments, "--http-proxy", proxy.url) == (0, ""), arguments
            assert len(set(proxy.asked)) == asked


def test_a_proxy_that_is_asked_for_carries_what_workers_are_asked(proxy: Proxy) -> None:
    [status] = asyncio.run(worker_statuses(["http://worker.example:8000"], 5_000, proxy.url))
    assert status.error is None
    assert proxy.asked == ["GET http://worker.example:8000/planner?last=0"]


@pytest.mark.parametrize(
    "url", ["", "proxy:3128", "https://proxy:3128", "http://", "http://u:s3cret@:1", "http://s3cret@proxy:x", "http://[s3cret"]
)
def test_what_is_no_proxy_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidArgument, match="http_proxy") as caught:
        attnstore.connect("grpc://127.0.0.1:1", http_proxy=url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_transport_that_no_proxy_carries_is_refused_beside_one(transport: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{transport}.*HTTP proxy"):
        attnstore.connect("grpc://127.0.0.1:1", transport=transport, http_proxy="http://127.0.0.1:1")


def attnstore_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnstore.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def command(*arguments: str) -> tuple[int, str]:
    """Returns exit status and standard error."""
    done = attnstore_command(*arguments)
    return done.returncode, done.stderr


def status_of(url: str) -> str:
    return attnstore_command("status", "--json", url).stdout
