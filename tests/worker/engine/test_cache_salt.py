"""Requests with different salts share no page, here or in the store; those with equal salts do, and the tokens are the same."""

from __future__ import annotations

import asyncio

import pytest

import attnstore
from attnstore.core.hashing import block_hashes, namespace
from attnstore.testing import StoreProcess
from attnstore_worker.engine import AsyncEngine, AttendPolicy, Engine, EngineOptions, SamplingParams, Sequence
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore

WAIT_MS = 60_000
HOW = SamplingParams(max_tokens=40)
SALTS = ("", "ada", "bob")


def options(model: LoadedModel, blocks: int = 60, **more: object) -> EngineOptions:
    named = {"chunk_tokens": 32, "store_deadline_ms": WAIT_MS, **more}
    return EngineOptions(pool_bytes=blocks * model.layout(16).page_bytes, **named)  # type: ignore[arg-type]


def prompt(tokens: int) -> list[int]:
    return [(7 * index * index + 13 * index) % 4096 + 10 for index in range(tokens)]


def run(engine: Engine, token_ids: list[int], salt: str) -> Sequence:
    sequence = engine.submit(token_ids, HOW, cache_salt=salt)
    while sequence.finish_reason is None:
        engine.step()
    engine.check()
    assert engine.flush(WAIT_MS)
    return sequence


def hit_tokens(sequence: Sequence) -> int:
    assert sequence.admission is not None
    return sequence.admission.hit_tokens


@pytest.mark.parametrize("drops", [False, True])
def test_equal_salts_share_pages_and_different_ones_do_not(tiny: LoadedModel, store: MemoryStore, drops: bool) -> None:
    token_ids = prompt(100)
    with Engine(tiny, options(tiny), store=store) as engine:
        for number, salt in enumerate(SALTS):
            first = run(engine, token_ids, salt)
            assert hit_tokens(first) == 0
            assert len(store.pages) == (number + 1) * (139 // 16)
            if drops:  # then the second engine's pages come from the store
                engine.drop_cached()
            second = run(engine, token_ids, salt)
            assert hit_tokens(second) == 96
            assert second.generated == first.generated
            assert set(first.hashes) <= store.pages.keys()


@pytest.mark.parametrize("tokens", [5, 16, 100])
def test_a_salt_is_in_the_hash_of_each_block(tiny: LoadedModel, tokens: int) -> None:
    chain = namespace(tiny.layout(16), model=tiny.fingerprint)
    with Engine(tiny, options(tiny)) as engine:
        names = {salt: run(engine, prompt(tokens), salt).hashes for salt in SALTS}
        ids = run(engine, prompt(tokens), "").token_ids[:-1]
    for salt, hashes in names.items():
        assert hashes == block_hashes(chain, ids, 16, [b"cache_salt:" + salt.encode()] if salt else [])


def test_what_waits_and_what_is_preempted_keeps_its_salt(tiny: LoadedModel, store: MemoryStore) -> None:
    chain = namespace(tiny.layout(16), model=tiny.fingerprint)
    read: set[bytes] = set()
    store.on_page = read.add
    with Engine(tiny, options(tiny), store=store) as engine:
        run(engine, prompt(100), "ada")
    # The pool has room for two of them only at their beginning; the pages of the others are prefetched.
    with Engine(tiny, options(tiny, blocks=16, sequences_max=2), store=store) as engine:
        sequences = [
            engine.submit(prompt(100), SamplingParams(max_tokens=100), cache_salt=salt) for salt in ("bob", "carol", "ada", "bob")
        ]
        while any(sequence.finish_reason is None for sequence in sequences):
            engine.step()
            engine.check()
        assert engine.batching().preemptions > 0
    for sequence, salt in zip(sequences, (b"bob", b"carol", b"ada", b"bob"), strict=True):
        assert sequence.generated == sequences[0].generated
        assert sequence.hashes == block_hashes(chain, sequence.token_ids[:-1], 16, [b"cache_salt:" + salt])
    assert set(sequences[2].hashes[:6]) <= read


def test_a_node_attends_to_pages_of_the_same_salt_alone(tiny: LoadedModel) -> None:
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node,
        attnstore.connect(node.url, transport="tcp", deadline_ms=WAIT_MS) as client,
        Engine(tiny, options(tiny, attend=AttendPolicy.ALWAYS), store=client, attend_store=client) as engine,
    ):
        for salt in SALTS:
            generated = []
            for in_store in (0, 96):
                sequence = run(engine, prompt(100), salt)
                assert sequence.admission is not None
                assert sequence.admission.remote_tokens == in_store
                generated.append(sequence.generated)
                engine.drop_cached()
            assert generated[0] == generated[1]


async def test_a_request_brings_its_salt(tiny: LoadedModel) -> None:
    with Engine(tiny, options(tiny)) as engine, AsyncEngine(engine) as front:
        for salt, hits in (("", 0), ("ada", 0), ("ada", 96), ("bob", 0), ("", 96)):
            async with asyncio.timeout(WAIT_MS / 1000), await front.submit(prompt(100), HOW, cache_salt=salt) as stream:
                async for _ in stream:
                    pass
                assert stream.hit_tokens == hits
