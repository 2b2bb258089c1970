"""Real clusters: store nodes in processes of their own around a real Redis-protocol server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import attnstore
from attnstore import PageStatus
from attnstore.client.cluster.client import AsyncClusterClient
from attnstore.testing import RedisServer, StoreProcess
from tests.samples import SMALL, Batch, eventually, make_batch

PATIENCE_S = 20.0


class Cluster:
    """A directory and nodes by name; `close` ends them all."""

    def __init__(self, *names: str, options: tuple[str, ...] = ()) -> None:
        self._stack = ExitStack()
        self._options = options
        self.directory = self._stack.enter_context(RedisServer())
        self.nodes: dict[str, StoreProcess] = {}
        self._addresses: dict[str, str] = {}
        try:
            for name in names:
                self.start(name)
            self.wait_for(*names)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return self.directory.url

    def start(self, name: str, *options: str) -> StoreProcess:
        """Starts a node; one that existed before returns at its address, empty."""
        listen = ("--listen", self._addresses[name]) if name in self._addresses else ()
        member = ("--directory", self.url, "--node-id", name, "--capacity", "64MiB", "--drain-ms", "1000")
        node = self._stack.enter_context(StoreProcess(*listen, *member, *self._options, *options))
        self.nodes[name] = node
        self._addresses[name] = node.address
        return node

    def kill(self, name: str) -> None:
        self.nodes.pop(name).kill()

    def wait_for(self, *names: str) -> None:
        """Waits until the directory knows exactly these nodes."""
        with attnstore.connect(self.url) as client:
            assert eventually(lambda: known_to(client) == set(names), PATIENCE_S), f"{known_to(client)} are there, not {names}"

    def close(self) -> None:
        self._stack.close()


def known_to(client: attnstore.ClusterClient) -> set[str]:
    """Returns the nodes that a client knows."""
    try:
        return {member.node_id for member in client.members()}
    except attnstore.AttnStoreError:
        return set()


def stored(client: attnstore.ClusterClient, batch: Batch) -> Batch:
    """Returns the batch, after the cluster has stored it. Some pages may be ARRIVING at first, because nodes that joined a moment
    ago hand them over.
    """
    client.register_layout(batch.namespace, batch.layout)

    def refused() -> set[PageStatus]:
        written = client.write(batch.namespace, batch.hashes, batch.pages)
        return {verdict for verdict in written.verdicts if not verdict.is_kept}

    first = refused()
    assert first <= {PageStatus.ARRIVING}, first
    assert not first or eventually(lambda: not refused(), PATIENCE_S)
    return batch


def hits_and_no_wrong_byte(client: attnstore.ClusterClient, batch: Batch, deadline_ms: float = 5_000) -> int:
    """Returns how many pages of the batch are hits. Fails for a hit with wrong bytes, or for a late answer."""
    buffers = batch.buffers()
    began_s = time.monotonic()
    result = client.read(batch.namespace, batch.hashes, buffers, deadline_ms=deadline_ms)
    took_ms = (time.monotonic() - began_s) * 1e3
    assert took_ms < deadline_ms + 1_000, f"the read took {took_ms:.0f} ms"
    hits = [index for index, status in enumerate(result.statuses) if status.is_hit]
    assert all(buffers[index] == batch.pages[index] for index in hits)
    return len(hits)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `attnstore` with these arguments."""
    command = [sys.executable, "-m", "attnstore.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def status_of(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Returns the output of `attnstore status` for each node, by name."""
    shown = run_command("status", "--json", "--directory", cluster.url)
    assert shown.returncode == 0, shown.stderr
    return {node["node_id"]: node for node in json.loads(shown.stdout)["nodes"]}


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """Three nodes for tests that change only their own namespace."""
    cluster = Cluster("ada", "bob", "cleo")
    yield cluster
    cluster.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes for one test."""
    cluster = Cluster("ada", "bob", "cleo")
    yield cluster
    cluster.close()


@pytest.fixture
def replicated() -> Iterator[Cluster]:
    """Three nodes that keep two copies of each page."""
    cluster = Cluster("ada", "bob", "cleo", options=("--replicas", "2"))
    yield cluster
    cluster.close()


@pytest.fixture
def batch_of(request: pytest.FixtureRequest) -> Callable[..., Batch]:
    """`batch_of(pages)` returns pages that no other test uses, over several segments."""

    def make(pages: int, suffix: str = "") -> Batch:
        return make_batch(pages, model=request.node.nodeid + suffix, layout=SMALL)

    return make


def inner(client: attnstore.ClusterClient) -> AsyncClusterClient:
    """Returns the asynchronous client inside a blocking one."""
    return client._client
