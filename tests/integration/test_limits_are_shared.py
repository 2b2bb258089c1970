"""Every shared limit: one tenant takes as much of it as it can get, and another works as if it were alone.

`CASES` says how the first tenant exhausts a limit of a real node, over real sockets, at the limit's true size. A constant of
`attnstore.limits` that is missing in the tables here fails the first test, so that a new limit cannot be forgotten.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import attnstore
from attnstore import PageEventKind, PageStatus, limits
from attnstore.testing import StoreProcess
from tests.integration.greedy import CAPACITY_MIB, CASES, GREEDY, MODEST, Greedy
from tests.samples import deleted_after_reading, make_batch

ELSEWHERE: Final = {
    "GRPC_CONNECTIONS_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "GRPC_CONNECTIONS_MIN": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "CHANNEL_UNAUTHENTICATED_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "CHANNEL_BACKLOG_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "DESCRIPTORS_BESIDE_ARENA_MIN": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "OPEN_STREAMS_MAX": (
        "tests.integration.test_silent_peers:test_services_that_ask_for_no_token_hold_few_streams_and_the_oldest_gives_way"
    ),
    "ATTEND_PAGES_MAX": "tests.server.test_attend:test_the_pages_of_all_sets_are_bounded",
    "ATTEND_WAITING_MAX": "tests.server.test_turns:test_a_tenant_that_fills_the_queue_leaves_places_to_another",
    "HEAT_SEGMENTS_MAX": "tests.core.test_heat:test_a_tenant_that_uses_many_segments_leaves_counts_and_places_to_another",
    "HOT_SEGMENTS_MAX": "tests.core.test_heat:test_a_tenant_that_uses_many_segments_leaves_counts_and_places_to_another",
    "EVENTS_IN_BATCH_MAX": "tests.directory.test_events:test_a_tenant_with_many_events_leaves_room_for_anothers",
    "TOMBSTONES_MAX": "tests.core.test_tombstones:test_a_tenant_that_deletes_a_lot_makes_the_node_forget_its_own_deletions",
    "REPORTED_BYTES_PER_S_MAX": "tests.server.test_scrubber:test_reports_of_two_tenants_take_turns_and_neither_hashes_on_the_loop",
}
"""Shared limits that are tried with a small number, or that are shared by more than the tenants of one node."""

OF_ONE_REQUEST: Final = "what one message, request, page, stream or connection may be: each has its own"
OF_TIME: Final = "a time or a rate for each peer or task by itself"
OF_SIZES: Final = "the size of something, or a number that an operator chooses"
OF_OPERATORS: Final = "counts what operators and nodes write into the directory; no tenant can"
OF_HINTS: Final = "the newest of what all tell the directory; what is forgotten early is at worst a hit of bytes that were right"
OF_OPTIONS: Final = "bounds what a user or an operator may say in an option, of his own process"
OF_CLIENTS: Final = "bounds what one client or worker does, in its own process"

NOT_SHARED: Final[dict[str, tuple[str, ...]]] = {
    OF_SIZES: (
        *(
            "KIB",
            "MIB",
            "GIB",
            "HASH_BYTES",
            "LEASE_ID_BYTES",
            "EPOCH_BYTES",
            "SEGMENT_BLOCKS",
            "SEGMENT_KEY_BYTES",
            "CHALLENGE_BYTES",
        ),
        *("CAPACITY_BYTES_MAX", "PAGE_BYTES_MAX", "EXTENT_BYTES_MAX", "EXTENT_BYTES_MIN", "CHANNEL_TOKEN_BYTES"),
        *("REPLICAS_MAX", "NODE_WEIGHT_MAX", "HOT_USES_DEFAULT", "HOT_REPLICAS", "DESCRIPTORS_OTHER_MAX"),
        *("NODE_OTHER_BYTES_MIN", "VISIBLE_PAGES_MAX", "VISIBLE_LEASED_PAGES_MAX", "UNSEEN_OBJECTS_MAX", "_OBJECT_BYTES"),
        *("SCRUB_BYTES_PER_S_DEFAULT", "SCRUB_BYTES_PER_S_MAX", "NODE_ID_CHARS_MAX", "NODE_URL_CHARS_MAX", "QUOTA_BYTES_MAX"),
    ),
    OF_ONE_REQUEST: (
        *("MESSAGE_BYTES_MAX", "FRAME_BYTES_MAX", "CHUNK_BYTES_MAX", "CHUNK_HEADER_BYTES_MAX", "HASHES_MAX", "GRPC_CALLS_MAX"),
        *(
            "CHANNEL_READ_HASHES_MAX",
            "CHANNEL_MATCH_HASHES_MAX",
            "CHANNEL_SECOND_READ_HASHES_MAX",
            "CHANNEL_CREDITS",
            "CHANNEL_GATHER_PAGES",
        ),
        *("CHANNEL_REASON_BYTES_MAX", "SHM_LOCATE_HASHES_MAX", "SHM_TAKE_PAGES_MAX", "SHM_LENT_BYTES_MAX"),
        *("ATTEND_SETS_MAX", "ATTEND_HASHES_MAX", "ATTEND_ROWS_MAX", "ATTEND_BYTES_MAX", "ATTEND_FRAME_BYTES_MAX"),
        *(
            "ATTEND_HEADS_MAX",
            "LATENT_DIM_STEP",
            "LATENT_DIM_MAX",
            "ATTEND_TOGETHER_MAX",
            "MESSAGE_OVERHEAD_BYTES",
            "REPORTED_HASHES_MAX",
            "WATCH_EVENTS_MAX",
        ),
        *(
            "HTTP_BODY_BYTES_MAX",
            "HTTP_BODY_BRACKETS_MAX",
            "CACHE_SALT_CHARACTERS_MAX",
            "RECORD_BYTES_MAX",
            "WORK_PAGES_MAX",
            "MATCH_PAGES_MAX",
            "CREDENTIAL_BYTES_MAX",
            "REFUSAL_CHARS_MAX",
        ),
        "DELETION_HASHES_MAX",
    ),
    OF_TIME: (
        *(
            "LEASE_MS_MAX",
            "NAMESPACE_EMPTY_MS_MAX",
            "DEADLINE_MS_DEFAULT",
            "DEADLINE_MS_MAX",
            "KEEPALIVE_MS",
            "KEEPALIVE_TIMEOUT_MS",
        ),
        *("CONNECT_MS_MAX", "DRAIN_MS_DEFAULT", "STOP_MS_MAX", "GRPC_IDLE_MS_MAX", "OPEN_WRITE_MS_MAX", "PEER_BYTES_PER_S_MIN"),
        *("CHANNEL_TOKEN_MS_MAX", "CHANNEL_HELLO_MS_MAX", "CHANNEL_IDLE_MS_MAX", "CHANNEL_LAYER_PINS_MS_MAX"),
        *("HEARTBEAT_MS", "MEMBER_MS_MAX", "DIRECTORY_GAP_MS", "INTENT_MS_MAX", "DIRECTORY_MS_MAX", "HEAT_WINDOW_MS"),
        *("LAYOUT_MS_MAX", "PREVIOUS_OWNERS_MS_MAX", "TASK_AGAIN_MS_MIN", "TASK_AGAIN_MS_MAX", "REPORT_MS_MAX"),
        *("RECORD_AGAIN_MS", "RECORD_SIGNED_MS_MAX", "CREDENTIAL_MS_MAX", "CLOCKS_APART_MS_MAX"),
        *("TOMBSTONE_MS_MAX", "TOMBSTONE_MARGIN_MS", "PAGE_AGE_MS_MAX"),
        *(
            "ATTEND_VERIFIED_MS_MAX",
            "ATTEND_SPIN_MS",
            "HTTP_IDLE_MS_MAX",
            "HTTP_HEAD_MS_MAX",
            "HTTP_BODY_MS_MAX",
            "HTTP_STALL_MS_MAX",
        ),
    ),
    OF_OPTIONS: (
        *("BLOCK_TOKENS_MAX", "CONTEXT_TOKENS_MAX", "DECISIONS_SHOWN_MAX", "GPUS_MAX", "HOT_USES_MAX", "MEMORY_GB_PER_S_MAX"),
        *("PROMPT_CHARS_MAX", "SECRET_CHARS_MAX", "SEQUENCES_MAX", "SETTINGS_CHARS_MAX", "TENANT_CHARS_MAX", "THREADS_MAX"),
        "WAITING_MAX",
    ),
    OF_HINTS: ("DELETIONS_MAX", "DELETIONS_IN_BEAT_MAX"),
    OF_OPERATORS: ("NODES_MAX", "TENANTS_MAX", "DIRECTORY_LAYOUTS_MAX", "EVENT_BATCHES_MAX"),
    OF_CLIENTS: (
        *("CHANNELS_MAX", "NODE_ANSWER_MS_MAX", "NODE_FAIR_MS", "NODE_FAIR_BYTES_PER_MS", "HEDGES_PERCENT_MAX"),
        *("HEDGES_BURST_MAX", "PREVIOUS_OWNERS_MAX"),
    ),
}


def works(node: StoreProcess, transport: str) -> None:
    """Uses everything that a tenant uses on a node, over one transport."""
    batch = make_batch(2, model=f"modest, over {transport}")
    with attnstore.connect(node.url, token=MODEST, transport=transport) as client:
        client.register_layout(batch.namespace, batch.layout)
        events = client.watch(batch.namespace)
        assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {PageStatus.STORED}
        assert next(events).kind is PageEventKind.SEALED
        events.close()
        lease = client.match(batch.namespace, [batch.hashes], lease_ms=10_000).lease
        assert lease is not None
        client.renew(lease, 20_000)
        buffers = batch.buffers()
        answer = client.read(batch.namespace, batch.hashes, buffers, lease=lease)
        assert (answer.error, answer.transport, buffers) == (None, transport, batch.pages)
        assert client.release(lease)
        assert deleted_after_reading(client, batch.namespace, batch.hashes) == (PageStatus.OK, PageStatus.OK)


@pytest.fixture
def two_tenants(tmp_path: Path, limit: str) -> Iterator[StoreProcess]:
    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text(f'greedy = "{GREEDY}"\nmodest = "{MODEST}"\n')
    options = ("--capacity", f"{CAPACITY_MIB}MiB", "--tokens-file", str(tokens_file), "--drain-ms", "100")
    # A node that answers queries takes two seconds more to start.
    attends = ("--attend-threads", "1") if limit == "ATTEND_CALLS_MAX" else ()
    with StoreProcess(*options, *attends) as node:
        yield node


def test_every_limit_is_shared_or_bounds_nothing_shared() -> None:
    names = {name for name, value in vars(limits).items() if name.isupper() and isinstance(value, int | float)}
    not_shared = [name for group in NOT_SHARED.values() for name in group]
    listed = [*CASES, *ELSEWHERE, *not_shared]
    assert sorted(listed) == sorted(names)
    for where in ELSEWHERE.values():
        module, _, test = where.partition(":")
        assert callable(getattr(importlib.import_module(module), test))


@pytest.mark.parametrize("limit", CASES)
def test_what_one_tenant_takes_of_a_limit_leaves_another_its_part(two_tenants: StoreProcess, limit: str) -> None:
    greedy = Greedy(two_tenants)
    try:
        CASES[limit](greedy)
        for transport in ("grpc", "tcp", "shm"):
            works(two_tenants, transport)
    finally:
        greedy.close()
