"""Outages with real processes: never a wrong page, never a call that exceeds its deadline, and the hits recover."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

import attnstore
from attnstore import errors
from attnstore.limits import HEARTBEAT_MS, MEMBER_MS_MAX, SEGMENT_BLOCKS
from attnstore.testing import RedisServer, StoreProcess
from attnstore.testing.netns import Switch
from tests.cluster.conftest import Cluster, hits_and_no_wrong_byte, known_to, stored
from tests.samples import Batch, eventually

pytestmark = pytest.mark.redis

BatchOf = Callable[..., Batch]
PAGES = 12 * SEGMENT_BLOCKS
DEADLINE_MS = 2_000
ALL = {"ada", "bob", "cleo"}


@contextmanager
def frozen(node: StoreProcess) -> Iterator[None]:
    """Freezes the node: it does nothing, and its connections stay open."""
    node.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.process.send_signal(signal.SIGCONT)


def share_of(cluster: Cluster, name: str) -> int:
    with attnstore.connect(cluster.nodes[name].url) as client:
        return client.stats().pages_sealed


@pytest.mark.parametrize("outage", ["killed", "silent"])
def test_while_the_directory_is_away_everything_goes_on_and_afterwards_news_come_again(
    cluster: Cluster, batch_of: BatchOf, outage: str
) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        if outage == "killed":
            cluster.directory.kill()
        else:
            cluster.directory.pause()
        assert hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == PAGES
        second = stored(client, batch_of(PAGES, "second"))
        assert all(eventually(lambda log=node: "directory does not answer" in log.log) for node in cluster.nodes.values())
        assert hits_and_no_wrong_byte(client, second, DEADLINE_MS) == PAGES
        if outage == "killed":
            cluster.directory.start()  # empty
        else:
            cluster.directory.resume()
        assert known_to(client) == ALL
        assert hits_and_no_wrong_byte(client, batch) == PAGES
        cluster.start("dora")
        assert eventually(lambda: known_to(client) == {*ALL, "dora"}, 20)
        assert hits_and_no_wrong_byte(client, batch) == PAGES


def test_a_client_that_has_never_reached_the_directory_is_told_so_within_its_deadline() -> None:
    with RedisServer() as server:
        server.pause()
        with attnstore.connect(server.url, deadline_ms=DEADLINE_MS) as client, pytest.raises(errors.Retryable, match="directory"):
            client.describe()
        server.resume()
        with attnstore.connect(server.url, deadline_ms=DEADLINE_MS) as client, pytest.raises(errors.Unavailable, match="no node"):
            client.describe()


def test_a_drain_that_the_directory_forgets_goes_on(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url) as client:
        batch = stored(client, batch_of(PAGES))
        drain = [sys.executable, "-m", "attnstore.cli", "drain", "bob", "--directory", cluster.url]
        assert subprocess.run([*drain, "--wait", "30"], check=False, timeout=60).returncode == 0
        cluster.directory.kill()
        cluster.directory.start()

        def is_drained() -> bool:
            states = {member.node_id: member.state.value for member in client.members()}
            return states == {"ada": "active", "bob": "drained", "cleo": "active"}

        assert eventually(lambda: "directory answers again" in cluster.nodes["bob"].log)
        assert eventually(is_drained)
        assert hits_and_no_wrong_byte(client, batch) == PAGES


@pytest.mark.parametrize("outage", ["paused", "emptied"])
def test_an_evicted_and_a_draining_node_stay_that_through_an_outage_of_the_directory(
    cluster: Cluster, batch_of: BatchOf, outage: str
) -> None:
    with attnstore.connect(cluster.url) as client:
        stored(client, batch_of(PAGES))
        for command, name in (("evict", "cleo"), ("drain", "bob")):
            asked = [sys.executable, "-m", "attnstore.cli", command, name, "--directory", cluster.url]
            assert subprocess.run(asked, check=False, timeout=60).returncode == 0

        def states() -> dict[str, str]:
            return {member.node_id: member.state.value for member in client.members()}

        assert eventually(lambda: states() == {"ada": "active", "bob": "drained"}, 20)
        seen = []
        if outage == "paused":
            cluster.directory.pause()
            time.sleep((MEMBER_MS_MAX + 2 * HEARTBEAT_MS) / 1000)
            cluster.directory.resume()
        else:
            cluster.directory.kill()
            cluster.directory.start()
        end_s = time.monotonic() + 2 * MEMBER_MS_MAX / 1000
        while time.monotonic() < end_s:
            seen.append(states())
            time.sleep(0.05)
        if outage == "paused":
            assert all(each == {"ada": "active", "bob": "drained"} for each in seen)
        assert seen[-1] == {"ada": "active", "bob": "drained"}


def test_a_node_that_dies_costs_its_own_pages_only_and_comes_back_empty(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url, deadline_ms=DEADLINE_MS) as client:
        batch = stored(client, batch_of(PAGES))
        lost = share_of(cluster, "bob")
        cluster.kill("bob")
        assert hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == PAGES - lost
        # Its segments are written to other nodes meanwhile, and found there.
        again = client.write(batch.namespace, batch.hashes, batch.pages)
        assert all(verdict.is_kept for verdict in again.verdicts)
        assert hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == PAGES
        cluster.start("bob")
        cluster.wait_for(*ALL)
        assert hits_and_no_wrong_byte(client, batch, DEADLINE_MS) >= PAGES - lost
        client.write(batch.namespace, batch.hashes, batch.pages)
        assert eventually(lambda: hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == PAGES)


def test_a_node_that_hangs_holds_nobody_up_for_longer_than_a_deadline(cluster: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(cluster.url, deadline_ms=DEADLINE_MS) as client:
        batch = stored(client, batch_of(PAGES))
        others = PAGES - share_of(cluster, "cleo")
        with frozen(cluster.nodes["cleo"]):
            # The first calls detect it; then the node is skipped, and no call waits for it.
            for _ in range(3):
                assert hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == others
                client.match(batch.namespace, [batch.hashes], deadline_ms=DEADLINE_MS)
        assert eventually(lambda: hits_and_no_wrong_byte(client, batch, DEADLINE_MS) == PAGES, 20)


def test_with_two_copies_a_node_that_hangs_costs_no_hit(replicated: Cluster, batch_of: BatchOf) -> None:
    with attnstore.connect(replicated.url, deadline_ms=2 * DEADLINE_MS) as client:
        batch = stored(client, batch_of(PAGES))
        with frozen(replicated.nodes["ada"]):
            assert hits_and_no_wrong_byte(client, batch, 2 * DEADLINE_MS) == PAGES
            assert client.match(batch.namespace, [batch.hashes]).hits == (PAGES,)


def test_a_read_whose_node_has_become_slow_is_answered_by_the_other_copy_long_before_its_deadline(
    replicated: Cluster, batch_of: BatchOf
) -> None:
    patient_ms = 40_000
    with attnstore.connect(replicated.url) as client:
        batch = stored(client, batch_of(PAGES))
        assert hits_and_no_wrong_byte(client, batch) == PAGES  # the usual duration of a read is known from now on
        with frozen(replicated.nodes["bob"]):
            buffers = batch.buffers()
            began_s = time.monotonic()
            result = client.read(batch.namespace, batch.hashes, buffers, deadline_ms=patient_ms)
            # Without a hedge the node would get half of the time before the other copy is requested.
            assert (time.monotonic() - began_s) * 1e3 < patient_ms / 2
        assert result.leading_hits == PAGES
        assert buffers == batch.pages


def test_clients_with_different_views_read_what_was_written_or_nothing(cluster: Cluster, batch_of: BatchOf) -> None:
    addresses = [node.address for node in cluster.nodes.values()]
    with ExitStack() as stack:
        views = [addresses, addresses[:2], addresses[1:], addresses[::-1]]
        clients = [stack.enter_context(attnstore.connect("grpc://" + ",".join(view))) for view in views]
        batches = [stored(client, batch_of(PAGES, str(number))) for number, client in enumerate(clients)]
        for client in clients:
            for own, batch in zip(clients, batches, strict=True):
                client.register_layout(batch.namespace, batch.layout)
                hits = hits_and_no_wrong_byte(client, batch)
                assert hits == PAGES if client is own else 0 < hits <= PAGES


@pytest.mark.netns
def test_a_node_whose_clock_is_a_day_ahead_is_a_member_like_any_other(cluster: Cluster, batch_of: BatchOf) -> None:
    in_a_day = ("unshare", "--time", "--monotonic", "86400", "--boottime", "86400", "--fork", "--kill-child")
    serve = ("-m", "attnstore.cli", "serve", "--listen", "127.0.0.1:0", "--capacity", "64MiB")
    ahead = subprocess.Popen(
        [*in_a_day, sys.executable, *serve, "--directory", cluster.url, "--node-id", "tomorrow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert ahead.stdout is not None
        assert ahead.stdout.readline().startswith("listening on")
        cluster.wait_for(*ALL, "tomorrow")
        with attnstore.connect(cluster.url) as client:
            batch = stored(client, batch_of(PAGES))
            lease = client.match(batch.namespace, [batch.hashes], lease_ms=60_000).lease
            assert lease is not None
            assert client.read(batch.namespace, batch.hashes, batch.buffers(), lease=lease).leading_hits == PAGES
            assert hits_and_no_wrong_byte(client, batch) == PAGES
            assert known_to(client) == {*ALL, "tomorrow"}
    finally:
        ahead.kill()
        ahead.communicate()


# Reads the same pages repeatedly and prints how many were hits and how long that took; ends with its input.
_READER = """
import json, sys, time
import attnstore
from tests.samples import make_batch
batch = make_batch(int(sys.argv[2]), model="partition")
# Over TCP: all hosts of the switch share one file system, and so shared memory.
with attnstore.connect(sys.argv[1], deadline_ms=2_000, transport="tcp") as client:
    while len(client.members()) < 2:
        time.sleep(0.05)
    client.register_layout(batch.namespace, batch.layout)
    written = client.write(batch.namespace, batch.hashes, batch.pages)
    assert all(verdict.is_kept for verdict in written.verdicts), written
    print("ready", flush=True)
    for _ in sys.stdin:
        began, buffers = time.monotonic(), batch.buffers()
        result = client.read(batch.namespace, batch.hashes, buffers)
        hits = [index for index, status in enumerate(result.statuses) if status.is_hit]
        wrong = sum(buffers[index] != batch.pages[index] for index in hits)
        print(json.dumps({"hits": len(hits), "wrong": wrong, "seconds": time.monotonic() - began}), flush=True)
"""


@pytest.mark.netns
def test_a_worker_that_is_cut_off_from_one_node_misses_its_pages_until_the_cut_is_mended() -> None:
    with Switch() as switch, ExitStack() as stack:
        with switch.join("directory").entered():
            directory = stack.enter_context(RedisServer("protected-mode no", host="0.0.0.0"))
        url = f"redis://10.98.77.1:{directory.port}/0"
        hosts = {name: switch.join(name) for name in ("ada", "bob")}
        for name, host in hosts.items():
            with host.entered():
                member = ("--directory", url, "--node-id", name, "--insecure", "--capacity", "64MiB", "--drain-ms", "0")
                stack.enter_context(StoreProcess("--listen", f"{host.address}:0", *member))
        with switch.join("worker").entered():
            reader = subprocess.Popen(
                [sys.executable, "-c", _READER, url, str(PAGES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            assert _read(reader)["hits"] == PAGES
            switch.cut(hosts["bob"])
            cut = [_read(reader) for _ in range(4)]
            switch.mend(hosts["bob"])
            assert all(read["wrong"] == 0 and read["seconds"] < 3 for read in cut)
            assert all(0 < read["hits"] < PAGES for read in cut), cut
            assert eventually(lambda: _read(reader)["hits"] == PAGES, 30)
        finally:
            reader.kill()
            reader.communicate()


def _read(reader: subprocess.Popen[str]) -> dict[str, float]:
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write("read\n")
    reader.stdin.flush()
    return dict(json.loads(reader.stdout.readline()))
