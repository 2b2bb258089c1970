"""The directory on Redis or Valkey: standalone, behind Sentinel, or a Redis Cluster.

Owns: the connections. Invariants: every call ends within `limits.DIRECTORY_MS_MAX` and fails as `Unavailable`, whatever the cause;
one call is one command. The commands are in `attnstore.directory.scripts`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from attnstore.directory import scripts
from attnstore.directory.deletions import Deletion
from attnstore.directory.members import EventBatch, Intent, LayoutRecord, Member, Membership, RecordKind, Revision
from attnstore.directory.records import RecordReader, Told
from attnstore.directory.trust import MemberCheck, Trust
from attnstore.directory.url import DirectoryUrl
from attnstore.errors import Unavailable
from attnstore.limits import (
    DELETIONS_IN_BEAT_MAX,
    DELETIONS_MAX,
    DIRECTORY_LAYOUTS_MAX,
    DIRECTORY_MS_MAX,
    EVENT_BATCHES_MAX,
    LAYOUT_MS_MAX,
    TENANTS_MAX,
    TOMBSTONE_MS_MAX,
)


class RedisDirectory:
    """See `Directory`. Belongs to one event loop; connects at first use and again after every loss."""

    def __init__(self, url: DirectoryUrl, trust: Trust) -> None:
        self._url = url
        self._trust = trust
        self._records = RecordReader(url.shown, trust)
        self._sentinels: list[Any] = []
        self._client = self._connect(url)
        self._key = {name: f"{{attnstore:{url.cluster}}}:{name}" for name in scripts.KEYS}
        self._cluster_keys = [self._key[name] for name in scripts.MEMBERSHIP_KEYS]

    @property
    def name(self) -> str:
        return self._url.shown

    @property
    def skipped(self) -> dict[RecordKind, int]:
        return self._records.skipped

    def check_of(self, member: Member) -> MemberCheck | None:
        return self._trust.check_of(member)

    async def announce(self, member: Member, ttl_ms: int, known: Revision | None) -> Membership | None:
        told = self._told(known)
        record = self._trust.sealed(RecordKind.NODE, member.node_id, member.to_json())
        arguments = (*_revision(told), secrets.token_hex(8), member.node_id, record, ttl_ms, scripts.KEEP_MS)
        return self._records.membership(await self._eval(scripts.ANNOUNCE, self._cluster_keys, *arguments), told)

    async def membership(self, known: Revision | None) -> Membership | None:
        told = self._told(known)
        return self._records.membership(await self._look(scripts.MEMBERSHIP, self._cluster_keys, *_revision(told)), told)

    async def withdraw(self, node_id: str) -> None:
        await self._eval(scripts.WITHDRAW, self._cluster_keys, node_id)

    async def set_intent(self, node_id: str, intent: Intent | None) -> bool:
        record = "" if intent is None else self._trust.sealed(RecordKind.INTENT, node_id, intent.value)
        return bool(await self._eval(scripts.SET_INTENT, self._cluster_keys, node_id, record, scripts.KEEP_MS))

    async def put_layouts(self, layouts: Sequence[LayoutRecord]) -> None:
        records = [record.to_json() for record in layouts]
        await self._eval(scripts.PUT_LAYOUTS, [self._key["layouts"]], LAYOUT_MS_MAX, DIRECTORY_LAYOUTS_MAX, *records)

    async def layouts(self) -> list[LayoutRecord]:
        return self._records.layouts(await self._look(scripts.LAYOUTS, [self._key["layouts"]]))

    async def set_quota(self, tenant: str, quota_bytes: int | None) -> None:
        value = "" if quota_bytes is None else self._trust.sealed(RecordKind.QUOTA, tenant, str(quota_bytes))
        await self._eval(scripts.SET_QUOTA, self._cluster_keys, tenant, value, TENANTS_MAX)

    async def publish(self, batch: EventBatch) -> None:
        arguments = (EVENT_BATCHES_MAX, scripts.KEEP_MS, batch.node_id, batch.packed, batch.dropped)
        await self._eval(scripts.PUBLISH, [self._key["events"]], *arguments)

    async def events(self, after: str | None, wait_ms: int) -> tuple[list[EventBatch], str]:
        position = after or await self._last_event()
        # The server stops waiting before the connection's time limit, which the call would exceed otherwise.
        block_ms = max(1, min(wait_ms, DIRECTORY_MS_MAX // 2))
        answer = await self._ask(self._client.xread({self._key["events"]: position}, block=block_ms), DIRECTORY_MS_MAX)
        # RESP2 answers with a list of pairs, RESP3 with a map.
        streams = dict(answer or ())
        entries = [entry for stream in streams.values() for entry in _flat_entries(stream)]
        return self._records.events(entries), entries[-1][0].decode() if entries else position

    async def publish_deletions(self, node_id: str, deletions: Sequence[Deletion]) -> None:
        records = [self._trust.sealed(RecordKind.DELETION, node_id, deletion.to_json()) for deletion in deletions]
        arguments = (DELETIONS_MAX, TOMBSTONE_MS_MAX, node_id, *records)
        await self._eval(scripts.PUBLISH_DELETIONS, [self._key["deletions"]], *arguments)

    async def deletions(self, after: str | None) -> tuple[list[Deletion], str | None]:
        begin = "-" if after is None else f"({after}"
        answer = await self._look(scripts.DELETIONS, [self._key["deletions"]], begin, 4 * DELETIONS_IN_BEAT_MAX)
        entries = answer[1]
        return self._records.deletions(answer), entries[-1][0].decode() if entries else after

    async def close(self) -> None:
        async with AsyncExitStack() as closing:
            for client in (self._client, *self._sentinels):
                closing.push_async_callback(client.aclose)

    def _connect(self, url: DirectoryUrl) -> Any:
        # The periodic caller repeats a failed call; the library must not retry it at once.
        patience: dict[str, Any] = {
            "socket_timeout": DIRECTORY_MS_MAX / 1000,
            "socket_connect_timeout": DIRECTORY_MS_MAX / 1000,
            "retry": Retry(NoBackoff(), 0),
        }
        login: dict[str, Any] = {"username": url.username, "password": url.password}
        encryption: dict[str, Any] = {"ssl": True, "ssl_ca_certs": url.ca} if url.tls else {}
        if url.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            return RedisCluster(startup_nodes=nodes, **patience, **login, **encryption)
        if url.kind == "sentinel":
            new_manager: Any = Sentinel  # the package has no type hints
            # Sentinels have users of their own, or none: the login is for the server that they name.
            own_login = {"username": url.sentinel_username, "password": url.sentinel_password}
            manager = new_manager(url.hosts, sentinel_kwargs={**patience, **own_login, **encryption})
            self._sentinels = manager.sentinels
            return manager.master_for(url.service, db=url.database, **patience, **login, **encryption)
        ((host, port),) = url.hosts
        return Redis(host=host, port=port, db=url.database, **patience, **login, **encryption)

    def _told(self, known: Revision | None) -> Told:
        """Returns the state since which changes are requested: what the caller knows, if it is still here, or nothing."""
        told = self._records.known
        return told if told.revision == known else Told()

    async def _last_event(self) -> str:
        newest = await self._ask(self._client.xrevrange(self._key["events"], count=1), DIRECTORY_MS_MAX)
        return newest[0][0].decode() if newest else "0-0"

    async def _eval(self, script: str, keys: Sequence[str], *arguments: object) -> Any:
        return await self._ask(self._client.eval(script, len(keys), *keys, *arguments), DIRECTORY_MS_MAX)

    async def _look(self, script: str, keys: Sequence[str], *arguments: object) -> Any:
        """Runs a read-only script, so that a user with read access may run it."""
        return await self._ask(self._client.eval_ro(script, len(keys), *keys, *arguments), DIRECTORY_MS_MAX)

    async def _ask(self, command: Any, limit_ms: float) -> Any:
        try:
            async with asyncio.timeout(limit_ms / 1000):
                return await command
        except TimeoutError:
            raise Unavailable(f"the directory {self.name} did not answer within {limit_ms:g} ms") from None
        except (RedisError, RedisClusterException, OSError) as error:
            reason = self._url.without_secrets(str(error))
            raise Unavailable(f"the directory {self.name} failed: {type(error).__name__}: {reason}") from None


def _revision(told: Told) -> tuple[str, str]:
    return (told.revision.incarnation, str(told.revision.number)) if told.revision else ("", "")


def _flat_entries(stream: Any) -> Any:
    """Returns the entries of one stream; RESP3 nests them one level deeper."""
    return stream[0] if stream and isinstance(stream[0], list) else stream
