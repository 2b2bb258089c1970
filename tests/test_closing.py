"""Shutdown of several parts: a step that fails does not prevent the others, and is reported."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import attnstore
from attnstore.arena import ShmArena
from attnstore.client.cluster.attend import StoreAttention
from attnstore.client.cluster.membership import ClusterMembership
from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.facade import LoopThread
from attnstore.client.transports.channel_pool import ChannelPool
from attnstore.client.transports.connection import NodeConnection
from attnstore.client.transports.shm import ShmTransport
from attnstore.client.transports.tcp import TcpTransport
from attnstore.directory.redis import RedisDirectory
from attnstore.server.registration import Registration
from attnstore.server.scrubber import Scrubber
from attnstore_worker.cache import CacheManager
from attnstore_worker.engine.engine import Engine


class Fault(Exception):
    """The error of the first step."""


class Steps:
    """Parts to be ended, which may be closed in any way; the first to be closed fails."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def _take(self, name: str) -> None:
        self.taken.append(name)
        if len(self.taken) == 1:
            raise Fault

    def blocking(self, name: str) -> Any:
        def take(*_: object) -> None:
            self._take(name)

        return SimpleNamespace(close=take, end=take, shutdown=take)

    def awaited(self, name: str) -> Any:
        async def take(*_: object) -> None:
            self._take(name)

        return SimpleNamespace(close=take, aclose=take, withdraw=take)

    async def failing_task(self) -> asyncio.Task[None]:
        async def fail() -> None:
            self._take("task")

        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        return task


Owner = Callable[..., Any]
CASES: dict[str, tuple[Owner, Callable[[Steps], dict[str, Any]], set[str]]] = {
    "a connection": (
        NodeConnection.close,
        lambda steps: {
            "_grpc": SimpleNamespace(channel=steps.awaited("grpc")),
            "_tcp": steps.blocking("tcp"),
            "shm": steps.blocking("shm"),
        },
        {"grpc", "tcp", "shm"},
    ),
    "the page channel": (
        TcpTransport.close,
        lambda steps: {
            "_pool": steps.blocking("pool"),
            "_parts": steps.blocking("parts"),
            "_attending": [steps.blocking("1"), steps.blocking("2")],
        },
        {"pool", "parts", "1", "2"},
    ),
    "shared memory": (
        ShmTransport.close,
        lambda steps: {
            "_pool": steps.blocking("pool"),
            "_parts": steps.blocking("parts"),
            "_lock": threading.Lock(),
            "_extents": {},
        },
        {"pool", "parts"},
    ),
    "connections in use": (
        ChannelPool.close,
        lambda steps: {
            "_lock": threading.Lock(),
            "_in_use": [steps.blocking("1"), steps.blocking("2")],
            "_drop_idle": steps.blocking("idle").close,
        },
        {"1", "2", "idle"},
    ),
    "idle connections": (
        ChannelPool._drop_idle,
        lambda steps: {"_lock": threading.Lock(), "_idle": [steps.blocking("1"), steps.blocking("2")]},
        {"1", "2"},
    ),
    "a membership": (
        ClusterMembership.close,
        lambda steps: {
            "_watching": None,
            "_close_links": steps.awaited("links").close,
            "_directory": steps.awaited("directory"),
        },
        {"links", "directory"},
    ),
    "links to nodes": (
        ClusterMembership._close_links,
        lambda steps: {"_links": {"1": steps.awaited("1"), "2": steps.awaited("2")}},
        {"1", "2"},
    ),
    "a directory": (
        RedisDirectory.close,
        lambda steps: {"_client": steps.awaited("client"), "_sentinels": [steps.awaited("1"), steps.awaited("2")]},
        {"client", "1", "2"},
    ),
    "an arena": (
        ShmArena.close,
        lambda steps: {"_files": [steps.blocking("1"), steps.blocking("2")]},
        {"1", "2"},
    ),
    "a cache": (
        CacheManager.close,
        lambda steps: {
            "_writer": steps.blocking("writer"),
            "_lender": steps.blocking("lender"),
            "_reap": steps.blocking("blocks").close,
        },
        {"writer", "lender", "blocks"},
    ),
    "attention over a store's pages": (
        StoreAttention.close,
        lambda steps: {
            "_prefixes": ["1", "2"],
            "close_prefix": steps.blocking("prefix").close,
            "_streams": {"1": steps.blocking("1"), "2": steps.blocking("2")},
        },
        {"prefix", "1", "2"},
    ),
    "an engine": (
        Engine.close,
        lambda steps: {"_attend": SimpleNamespace(remote=steps.blocking("attend")), "_cache": steps.blocking("cache")},
        {"attend", "cache"},
    ),
}


async def _ended(close: Owner, parts: dict[str, Any]) -> None:
    ended = close(SimpleNamespace(**parts))
    if inspect.isawaitable(ended):
        await ended


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_the_steps_behind_one_that_fails_are_taken_and_the_failure_is_told(
    case: tuple[Owner, Callable[[Steps], dict[str, Any]], set[str]],
) -> None:
    close, parts_of, expected = case
    steps = Steps()
    with pytest.raises(Fault):
        await _ended(close, parts_of(steps))
    assert set(steps.taken) == expected


@pytest.mark.parametrize(
    ("close", "task", "others"),
    [
        (ClusterMembership.close, "_watching", ("_directory",)),
        (NodeLink.close, "_probing", ("client",)),
        (Registration.stop, "_task", ("_directory",)),
        (Scrubber.stop, "_task", ("_worker",)),
    ],
    ids=["membership", "link", "registration", "scrubber"],
)
async def test_a_task_that_failed_keeps_nothing_behind_it_from_its_end(close: Owner, task: str, others: tuple[str, ...]) -> None:
    steps = Steps()
    parts = {name: steps.blocking(name) if name == "_worker" else steps.awaited(name) for name in others}
    parts |= {task: await steps.failing_task(), "_close_links": steps.awaited("links").close}
    parts |= {"_withdraw": steps.awaited("record").close}
    with pytest.raises(Fault):
        await close(SimpleNamespace(**parts))
    assert {"task", *others} <= set(steps.taken)


@pytest.fixture
def loop_users() -> Iterator[Callable[[], int]]:
    before = LoopThread._users
    yield lambda: LoopThread._users - before
    LoopThread._users = before


async def _fail(close: Callable[[], Any]) -> None:
    await close()
    raise Fault


def test_a_blocking_client_whose_connection_ends_badly_gives_its_thread_back(loop_users: Callable[[], int]) -> None:
    client = attnstore.connect("grpc://127.0.0.1:1")
    close = client._client.close
    client._client.close = lambda: _fail(close)  # type: ignore[method-assign]
    with pytest.raises(Fault):
        client.close()
    client.close()
    assert loop_users() == 0


def test_a_blocking_client_closes_every_attention_and_its_connections(loop_users: Callable[[], int]) -> None:
    client = attnstore.connect("grpc://127.0.0.1:1,127.0.0.1:2")
    assert isinstance(client, attnstore.ClusterClient)
    steps = Steps()
    attentions = [steps.blocking("1"), steps.blocking("2")]
    client._open = attentions  # type: ignore[assignment]
    client._client.close = steps.awaited("connections").close
    with pytest.raises(Fault), contextlib.closing(client):
        pass
    assert set(steps.taken) == {"1", "2", "connections"}
    assert loop_users() == 0
