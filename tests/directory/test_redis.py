"""The directory on real servers: keys that expire, bounded cost, Sentinel, Redis Cluster and ACL users."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis.exceptions import ResponseError

from attnstore.directory import Directory, EventBatch, Intent, LayoutRecord, Member, Membership, open_directory
from attnstore.directory.deletions import Deletion
from attnstore.directory.scripts import KEEP_MS, KEYS
from attnstore.errors import Unavailable
from attnstore.limits import EVENT_BATCHES_MAX, HOT_SEGMENTS_MAX, LAYOUT_MS_MAX, MEMBER_MS_MAX, SEGMENT_KEY_BYTES
from attnstore.testing import RedisServer
from attnstore.types import Space
from tests.directory.conftest import BINARIES
from tests.samples import eventually

pytestmark = pytest.mark.redis

ADA = Member("ada", "grpc://10.0.0.1:7400", bytes(16))
BEATS = 50
NODE_RIGHTS = "~{attnstore:*}* +eval +eval_ro +time +exists +@hash +@sortedset +@stream +pexpire +select"
WORKER_RIGHTS = "%R~{attnstore:*}* +eval_ro +time +hget +hgetall +zrangebyscore +zcount +xread +xrevrange +select"
EVENT = bytes([1]) + bytes(72)
HEARTBEAT_BYTES_MAX = 4096
MANY_NODES = 200
CHANGES = 10


async def use(directory: Directory) -> None:
    """Uses every operation of a directory once."""
    await directory.announce(ADA, MEMBER_MS_MAX, None)
    await directory.set_intent("ada", Intent.DRAIN)
    await directory.put_layouts([LayoutRecord(bytes(32), "tenant", 4096)])
    await directory.publish(EventBatch("ada", EVENT))
    await directory.set_quota("tenant", 1 << 30)
    await directory.publish_deletions("ada", [Deletion(Space("tenant", bytes(32)), (bytes(32),), 0)])
    assert len((await directory.deletions(None))[0]) >= 1
    membership = await directory.membership(None)
    assert membership is not None
    assert membership.members == (ADA,)
    assert len(await directory.layouts()) == 1


async def test_all_keys_are_documented_tagged_and_expire(server: RedisServer) -> None:
    server.client().flushall()
    directory = open_directory(f"{server.url}?cluster=blue")
    await use(directory)
    await directory.close()
    keys = {key.decode(): server.client().pttl(key) for key in server.client().keys("*")}
    assert set(keys) == {f"{{attnstore:blue}}:{name}" for name in KEYS}
    # Quotas are set by an operator, are not renewed, and stay until he removes them.
    assert keys.pop("{attnstore:blue}:quotas") == -1
    assert all(0 < left_ms <= max(KEEP_MS, LAYOUT_MS_MAX) for left_ms in keys.values())


async def test_the_stream_of_events_is_capped(server: RedisServer) -> None:
    directory = open_directory(f"{server.url}?cluster=stream")
    for number in range(EVENT_BATCHES_MAX + 40):
        await directory.publish(EventBatch("ada", EVENT, number))
    await directory.close()
    assert server.client().xlen("{attnstore:stream}:events") == EVENT_BATCHES_MAX


async def test_whoever_follows_the_changes_knows_what_whoever_asks_for_everything_is_told(server: RedisServer) -> None:
    random = Random(7)
    directory, follower = (open_directory(f"{server.url}?cluster=changes") for _ in range(2))
    known: Membership | None = None
    members = {f"node{number}": replace(ADA, node_id=f"node{number}") for number in range(8)}
    for _ in range(150):
        node_id = random.choice(list(members))
        match random.randrange(6):
            case 0:
                await directory.withdraw(node_id)
            case 1:
                await directory.set_intent(node_id, random.choice([*Intent, None]))
            case 2:
                await directory.set_quota(node_id, random.choice([random.randrange(1 << 40), None]))
            case _:
                members[node_id] = replace(members[node_id], hot=frozenset({random.randbytes(SEGMENT_KEY_BYTES)}))
                await directory.announce(members[node_id], 10 * MEMBER_MS_MAX, None)
        news = await follower.membership(known.revision if known is not None else None)
        known = news or known
        everything = await directory.membership(None)
        assert known is not None
        assert everything is not None
        assert (set(known.members), known.intents) == (set(everything.members), everything.intents)
        assert (known.quota_bytes, known.revision) == (everything.quota_bytes, everything.revision)
        full = await follower.membership(None) if random.randrange(20) == 0 else None
        known = full or known
    await directory.close()
    await follower.close()


async def test_a_change_of_what_is_hot_moves_bytes_of_one_record_not_of_all(server: RedisServer) -> None:
    cluster, follower = (open_directory(f"{server.url}?cluster=hot") for _ in range(2))
    hot = [frozenset(bytes([change]) * 6 + bytes([number]) for number in range(HOT_SEGMENTS_MAX)) for change in range(CHANGES + 1)]
    nodes = [replace(ADA, node_id=f"node{number}", hot=hot[0]) for number in range(MANY_NODES)]
    for node in nodes:
        await cluster.announce(node, 10 * MEMBER_MS_MAX, None)
    known = await follower.membership(None)
    assert known is not None
    assert len(known.members) == MANY_NODES
    client = server.client()
    moved = 0
    for change in range(1, CHANGES + 1):
        node = replace(nodes[change], hot=hot[change])
        await cluster.announce(node, 10 * MEMBER_MS_MAX, None)
        before = client.info("stats")["total_net_output_bytes"]
        known = await follower.membership(known.revision)
        # The answer to the question itself is counted in the next one.
        moved += client.info("stats")["total_net_output_bytes"] - before - len(str(client.info("stats")))
        assert known is not None
        assert node in known.members
        assert len(known.members) == MANY_NODES
    await cluster.close()
    await follower.close()
    assert moved < CHANGES * 4 * len(nodes[0].to_json())


async def test_clusters_in_one_directory_do_not_see_each_other(server: RedisServer) -> None:
    blue, green = (open_directory(f"{server.url}?cluster={name}") for name in ("blue2", "green2"))
    await blue.announce(ADA, MEMBER_MS_MAX, None)
    membership = await green.membership(None)
    assert membership is not None
    assert membership.members == ()
    await blue.close()
    await green.close()


async def test_a_heartbeat_and_a_look_cost_one_command_and_a_bounded_number_of_bytes_each(server: RedisServer) -> None:
    directory = open_directory(f"{server.url}?cluster=cost")
    known = await directory.announce(ADA, MEMBER_MS_MAX, None)
    assert known is not None
    client = server.client()
    before, calls_before = client.info("stats"), client.info("commandstats")
    for _ in range(BEATS):
        assert await directory.announce(ADA, MEMBER_MS_MAX, known.revision) is None
        assert await directory.membership(known.revision) is None
    after, calls_after = client.info("stats"), client.info("commandstats")
    await directory.close()
    assert _scripts(calls_after) - _scripts(calls_before) == 2 * BEATS
    moved = sum(after[name] - before[name] for name in ("total_net_input_bytes", "total_net_output_bytes"))
    # Requesting the statistics is part of the traffic; its answers are some kilobytes.
    assert moved < 2 * BEATS * HEARTBEAT_BYTES_MAX + 64_000


async def test_a_server_that_is_gone_or_silent_is_a_typed_error_within_the_limit_and_forgiven_when_it_is_back() -> None:
    with RedisServer() as server:
        directory = open_directory(server.url)
        await directory.announce(ADA, MEMBER_MS_MAX, None)
        server.pause()
        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            await directory.membership(None)
        assert time.monotonic() - began_s < 5
        server.resume()
        assert (await directory.membership(None)) is not None
        server.kill()
        with pytest.raises(Unavailable):
            await directory.membership(None)
        server.start()
        membership = await directory.membership(None)
        assert membership is not None
        assert membership.members == ()
        await directory.close()


@pytest.mark.parametrize("kind", ["redis", "redis+cluster", "redis+sentinel"])
async def test_a_server_that_cannot_be_reached_is_a_typed_error_of_every_kind_of_directory(kind: str) -> None:
    path = "/store" if kind == "redis+sentinel" else ""
    directory = open_directory(f"{kind}://127.0.0.1:1{path}")
    with pytest.raises(Unavailable):
        await directory.membership(None)
    await directory.close()


async def test_a_login_is_needed_where_the_server_asks_for_one_and_the_documented_rights_are_enough() -> None:
    with RedisServer("user default off", f"user ada on >s3cret {NODE_RIGHTS}") as server:
        address = f"{server.host}:{server.port}/0"
        known = open_directory(f"redis://ada:s3cret@{address}")
        await use(known)
        await known.close()
        for wrong in (f"redis://{address}", f"redis://ada:wr0ng@{address}"):
            stranger = open_directory(wrong)
            with pytest.raises(Unavailable) as refusal:
                await stranger.membership(None)
            assert "wr0ng" not in str(refusal.value)
            await stranger.close()


@pytest.mark.parametrize("binary", BINARIES.values(), ids=BINARIES.keys())
async def test_the_documented_user_for_workers_can_look_and_cannot_write(binary: str) -> None:
    users = ("user default off", f"user node on >n0de {NODE_RIGHTS}", f"user worker on >w0rker {WORKER_RIGHTS}")
    with RedisServer(*users, binary=binary) as server:
        node = open_directory(f"redis://node:n0de@{server.host}:{server.port}/0")
        worker = open_directory(f"redis://worker:w0rker@{server.host}:{server.port}/0")
        empty = await worker.membership(None)
        assert empty is not None
        assert empty.members == ()
        await use(node)
        membership = await worker.membership(empty.revision)
        assert membership is not None
        assert membership.members == (ADA,)
        assert await worker.membership(membership.revision) is None
        assert await worker.layouts() == await node.layouts()
        _, position = await worker.events(None, 1)
        await node.publish(EventBatch("ada", EVENT))
        assert (await worker.events(position, 1))[0] == [EventBatch("ada", EVENT)]
        writes: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: worker.announce(ADA, MEMBER_MS_MAX, None),
            lambda: worker.withdraw("ada"),
            lambda: worker.set_intent("ada", None),
            lambda: worker.set_quota("tenant", None),
            lambda: worker.put_layouts([LayoutRecord(bytes(32), "tenant", 8192)]),
            lambda: worker.publish(EventBatch("ada", EVENT)),
        )
        before = server.client(username="node", password="n0de").xlen("{attnstore:default}:events")
        for write in writes:
            with pytest.raises(Unavailable, match="NoPermission"):
                await write()
        assert await worker.membership(membership.revision) is None
        assert server.client(username="node", password="n0de").xlen("{attnstore:default}:events") == before
        await worker.close()
        await node.close()


async def test_tls_is_spoken_to_those_who_trust_the_authority(server: RedisServer, certificates: Path) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Acts as a server with TLS, which the one from the wheel does not support."""
        inner_reader, inner_writer = await asyncio.open_connection(server.host, server.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context) as listener:
        port = listener.sockets[0].getsockname()[1]
        trusting = open_directory(f"rediss://127.0.0.1:{port}/0?cluster=tls&ca={certificates / 'cert.pem'}")
        await use(trusting)
        await trusting.close()
        wary = open_directory(f"rediss://127.0.0.1:{port}/0?cluster=tls&ca={certificates / 'other.pem'}")
        with pytest.raises(Unavailable, match="certificate"):
            await wary.membership(None)
        await wary.close()


async def test_all_scripts_keep_to_one_slot_of_a_redis_cluster() -> None:
    with RedisServer("cluster-enabled yes") as server:
        client = server.client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        assert eventually(lambda: _cluster_is_ok(client))
        directory = open_directory(f"redis+cluster://{server.host}:{server.port}")
        await use(directory)
        _, position = await directory.events(None, 1)
        await directory.publish(EventBatch("ada", EVENT))
        assert (await directory.events(position, 1))[0] == [EventBatch("ada", EVENT)]
        await directory.close()


async def test_after_a_fail_over_the_directory_is_the_server_that_sentinel_names() -> None:
    with RedisServer() as primary, RedisServer(f"replicaof {primary.host} {primary.port}") as replica:
        replica_link = replica.client()
        assert eventually(lambda: replica_link.info("replication")["master_link_status"] == "up", 20)
        watch = (
            f"sentinel monitor store {primary.host} {primary.port} 1",
            "sentinel down-after-milliseconds store 500",
            "sentinel failover-timeout store 2000",
        )
        with RedisServer(*watch, arguments=("--sentinel",)) as sentinel:
            knows = sentinel.client()
            assert eventually(lambda: len(knows.execute_command("SENTINEL", "REPLICAS", "store")) == 1, 20)
            directory = open_directory(f"redis+sentinel://{sentinel.host}:{sentinel.port}/store/0")
            await directory.announce(ADA, 10 * MEMBER_MS_MAX, None)
            written = primary.client().info("replication")["master_repl_offset"]
            assert eventually(lambda: replica_link.info("replication")["slave_repl_offset"] >= written, 20)
            primary.kill()
            membership = await _answer(directory)
            assert membership.members == (ADA,)
            assert replica_link.info("replication")["role"] == "master"
            await directory.close()


async def test_sentinels_have_a_login_of_their_own() -> None:
    with RedisServer("requirepass s3cret/primary") as primary:
        watch = (f"sentinel monitor store {primary.host} {primary.port} 1", "sentinel auth-pass store s3cret/primary")
        with RedisServer("requirepass s3cret+sentinel", *watch, arguments=("--sentinel",)) as sentinel:
            url = f"redis+sentinel://:s3cret%2Fprimary@{sentinel.host}:{sentinel.port}/store/0"
            known = open_directory(f"{url}?sentinel_password=s3cret+sentinel")
            await use(known)
            await known.close()
            for login in ("", "?sentinel_password=wr0ng"):
                stranger = open_directory(url + login)
                with pytest.raises(Unavailable) as refusal:
                    await stranger.membership(None)
                assert "wr0ng" not in str(refusal.value)
                await stranger.close()


async def _answer(directory: Directory) -> Membership:
    """Returns the membership, once a server answers again."""
    end_s = time.monotonic() + 20
    while True:
        try:
            membership = await directory.membership(None)
            await directory.announce(ADA, 10 * MEMBER_MS_MAX, None)
        except Unavailable:
            assert time.monotonic() < end_s, "nobody took over"
            await asyncio.sleep(0.1)
        else:
            assert membership is not None
            return membership


def _scripts(calls: Any) -> int:
    """Counts the scripts that were run, writing and read-only ones."""
    return sum(calls[name]["calls"] for name in ("cmdstat_eval", "cmdstat_eval_ro") if name in calls)


def _cluster_is_ok(client: object) -> bool:
    try:
        info = client.execute_command("CLUSTER", "INFO")  # type: ignore[attr-defined]
    except ResponseError:
        return False
    state = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return str(state["cluster_state"]) == "ok"
