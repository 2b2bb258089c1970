"""The chaos run's client detects a wrong byte; otherwise its silence would prove nothing."""

from __future__ import annotations

import random

import attnstore
from attnstore.testing import StoreProcess
from experiments.chaos.observation import Call
from experiments.chaos.raw_client import RawClient


def turns(client: attnstore.Client, count: int) -> list[Call]:
    calls: list[Call] = []
    raw = RawClient(client, "raw", 5_000.0, calls.append)
    raw.register()
    draws = random.Random(1)
    for _ in range(count):
        raw.turn(draws)
    return calls


def reads(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.verb == "read"]


def test_right_pages_are_read_as_right_and_missing_ones_are_written(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        first = turns(client, 3)
        again = turns(client, 3)
    assert [call.hits for call in reads(first)] == [0, 0, 0]
    assert [(call.hits, call.asked, call.wrong) for call in reads(again)] == [(8, 8, 0)] * 3
    assert not [call for call in again if call.verb == "write"]


def test_a_page_with_other_bytes_than_its_hash_promises_is_wrong(node: StoreProcess) -> None:
    with attnstore.connect(node.url) as client:
        raw = RawClient(client, "liar", 5_000.0, lambda _: None)
        raw.register()
        for page_hash, page in raw._content.items():
            raw._content[page_hash] = page[:-1] + bytes([page[-1] ^ 1])
        draws = random.Random(1)
        raw.turn(draws)
        seen = reads(turns(client, 1))
    assert [call.wrong for call in seen] == [8]


def test_a_node_that_is_gone_costs_misses_and_no_exception(node: StoreProcess) -> None:
    with attnstore.connect(node.url, deadline_ms=500) as client:
        raw_calls: list[Call] = []
        raw = RawClient(client, "raw", 500.0, raw_calls.append)
        raw.register()
        node.kill()
        raw.turn(random.Random(1))
    assert all(call.is_miss for call in raw_calls if call.error is not None)
    assert [call.hits for call in reads(raw_calls)] == [0]
    assert not any(call.hung for call in raw_calls)
