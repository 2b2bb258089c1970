"""Windows and latent pages at real nodes in processes of their own, over both transports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnstore
from attnstore import errors
from attnstore.attention.merge import merge
from attnstore.attention.reference import ReferenceAttention, ReferenceLatentAttention
from attnstore.client.base import AttendStream
from attnstore.core.windows import first_keys
from attnstore.testing import StoreProcess

PAGES, BLOCK_TOKENS, Q_HEADS, SCALE = 12, 16, 6, 0.125
LAYOUT = attnstore.PageLayout(layers=2, kv_heads=2, head_dim=64, dtype=attnstore.DType.FP32)
LATENTS = attnstore.PageLayout.of_latents(layers=2, row_dim=576, dtype=attnstore.DType.BF16)
VALUE_DIM = 512
DEADLINE_MS = 60_000.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[StoreProcess]]:
    options = ("--capacity", "64MiB", "--attend-threads", "1")
    with StoreProcess(*options) as first, StoreProcess(*options) as second:
        yield [first, second]


@pytest.fixture(params=["tcp", "grpc"])
def clients(request: pytest.FixtureRequest, nodes: list[StoreProcess]) -> Iterator[list[attnstore.Client]]:
    with (
        attnstore.connect(nodes[0].url, transport=request.param, deadline_ms=DEADLINE_MS) as first,
        attnstore.connect(nodes[1].url, transport=request.param, deadline_ms=DEADLINE_MS) as second,
    ):
        yield [first, second]


def keep(
    client: attnstore.Client, layout: attnstore.PageLayout, pages: torch.Tensor, indices: list[int]
) -> tuple[bytes, list[bytes]]:
    """Stores pages; returns their namespace and hashes."""
    namespace = attnstore.namespace(layout, model=b"windows and latents")
    client.register_layout(namespace, layout)
    hashes = [attnstore.block_hashes(namespace, range(PAGES * BLOCK_TOKENS), BLOCK_TOKENS)[index] for index in indices]
    data = [pages[index].contiguous().view(torch.uint8).numpy().tobytes() for index in indices]
    client.write(namespace, hashes, data)
    return namespace, hashes


def pages_of(layout: attnstore.PageLayout) -> torch.Tensor:
    """Pages of one name have the same bytes in all tests."""
    torch.manual_seed(7)
    return torch.randn(PAGES, *layout.shape).to(torch.float32 if layout is LAYOUT else torch.bfloat16)


def opened(client: attnstore.Client, stream: AttendStream, namespace: bytes, hashes: list[bytes]) -> int:
    found = client.match(namespace, [[each] for each in hashes], lease_ms=60_000)
    assert found.lease is not None
    return stream.open(hashes, found.lease)


def bytes_of(rows: torch.Tensor) -> memoryview:
    return memoryview(rows.numpy()).cast("B")


def receive(stream: AttendStream, rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.empty(rows, Q_HEADS, dim), torch.empty(rows, Q_HEADS)
    stream.receive(bytes_of(out), bytes_of(lse))
    return out, lse


@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("window", [1, 70, 1000])
def test_partials_of_nodes_with_scattered_pages_merge_to_the_window(
    clients: list[attnstore.Client], window: int, rows: int
) -> None:
    """Two nodes share the pages of a prefix; a row is sent to a node only if it sees one of its keys."""
    pages = pages_of(LAYOUT)
    keys = PAGES * BLOCK_TOKENS
    query = torch.randn(rows, Q_HEADS, LAYOUT.head_dim)
    want_out, want_lse = ReferenceAttention().paged_attention(
        query,
        pages,
        torch.arange(PAGES, dtype=torch.int32).unsqueeze(0),
        torch.tensor([keys], dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32),
        layer=1,
        scale=SCALE,
        sliding_window=window,
        query_positions=torch.arange(keys, keys + rows, dtype=torch.int32),
    )
    outs, lses = [torch.zeros(query.shape)], [torch.full((rows, Q_HEADS), -torch.inf)]
    for client, indices in zip(clients, ([0, 1, 4, 7, 11], [2, 3, 5, 6, 8, 9, 10]), strict=True):
        namespace, hashes = keep(client, LAYOUT, pages, indices)
        firsts = [
            first for first in first_keys(indices, BLOCK_TOKENS, range(keys, keys + rows), window) if first < 16 * len(indices)
        ]
        if not firsts:
            continue
        with client.attend(namespace, q_heads=Q_HEADS, scale=SCALE) as stream:
            set_id = opened(client, stream, namespace, hashes)
            for layer in (0, 1):
                stream.ask(layer, [(set_id, len(firsts))], bytes_of(query[: len(firsts)]), firsts)
                out, lse = receive(stream, len(firsts), LAYOUT.head_dim)
            stream.ask(1, [(set_id, len(firsts))], bytes_of(query[: len(firsts)]))
            whole, _ = receive(stream, len(firsts), LAYOUT.head_dim)
            assert torch.equal(whole, out) == (not any(firsts)), "the same rows see all keys where none are first"
        outs.append(torch.zeros(query.shape))
        lses.append(torch.full((rows, Q_HEADS), -torch.inf))
        outs[-1][: len(firsts)], lses[-1][: len(firsts)] = out, lse
    got_out, got_lse = merge(outs, lses)
    torch.testing.assert_close(got_out, want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_lse, want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("firsts", [[16], [1 << 31], [(1 << 32) - 1]])
def test_a_row_that_sees_no_key_of_its_set_is_refused(clients: list[attnstore.Client], firsts: list[int]) -> None:
    namespace, hashes = keep(clients[0], LAYOUT, pages_of(LAYOUT), [0])
    with clients[0].attend(namespace, q_heads=Q_HEADS, scale=SCALE) as stream:
        set_id = opened(clients[0], stream, namespace, hashes)
        stream.ask(0, [(set_id, 1)], bytes_of(torch.ones(1, Q_HEADS, LAYOUT.head_dim)), firsts)
        with pytest.raises(errors.InvalidArgument, match="first key"):
            receive(stream, 1, LAYOUT.head_dim)


@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("window", [None, 70])
def test_a_node_answers_over_latent_pages_as_the_reference_does(
    clients: list[attnstore.Client], window: int | None, rows: int
) -> None:
    pages = pages_of(LATENTS).view(PAGES, LATENTS.layers, BLOCK_TOKENS, LATENTS.row_dim)
    keys = PAGES * BLOCK_TOKENS
    client, indices = clients[0], list(range(PAGES))
    offer = client.describe().attend
    assert offer is not None
    assert (offer.latents, offer.windows) == (True, True)
    namespace, hashes = keep(client, LATENTS, pages, indices)
    firsts = [] if window is None else first_keys(indices, BLOCK_TOKENS, range(keys, keys + rows), window)
    rows = len([first for first in firsts if first < keys]) or rows
    with client.attend(namespace, q_heads=Q_HEADS, scale=SCALE, value_dim=VALUE_DIM) as stream:
        set_id = opened(client, stream, namespace, hashes)
        for layer in (1, 0):
            query = torch.randn(rows, Q_HEADS, LATENTS.row_dim)
            stream.ask(layer, [(set_id, rows)], bytes_of(query), firsts[:rows])
            out, lse = receive(stream, rows, VALUE_DIM)
            want_out, want_lse = ReferenceLatentAttention().paged_attention(
                query,
                pages,
                torch.arange(PAGES, dtype=torch.int32).unsqueeze(0),
                torch.tensor([keys], dtype=torch.int32),
                torch.tensor([0, rows], dtype=torch.int32),
                layer=layer,
                scale=SCALE,
                value_dim=VALUE_DIM,
                sliding_window=window,
                query_positions=torch.arange(keys, keys + rows, dtype=torch.int32),
            )
            torch.testing.assert_close(out, want_out, rtol=0, atol=2e-5)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-5)


def test_latents_and_halves_are_not_taken_for_each_other(clients: list[attnstore.Client]) -> None:
    client = clients[0]
    namespace, hashes = keep(client, LATENTS, pages_of(LATENTS), [0])
    with client.attend(namespace, q_heads=Q_HEADS, scale=SCALE) as stream:
        set_id = opened(client, stream, namespace, hashes)
        stream.ask(0, [(set_id, 1)], bytes_of(torch.ones(1, Q_HEADS, LATENTS.row_dim)))
        with pytest.raises(errors.InvalidArgument, match="bytes"):
            receive(stream, 1, VALUE_DIM)
    plain, _ = keep(client, LAYOUT, pages_of(LAYOUT), [0])
    with pytest.raises(errors.InvalidArgument, match="kv_heads"):
        client.attend(plain, q_heads=Q_HEADS, scale=SCALE, value_dim=64)
