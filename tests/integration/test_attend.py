"""Attend at real nodes in processes of their own: over both transports, from two nodes at once, and with failing nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnstore
from attnstore import errors
from attnstore.attention.merge import merge
from attnstore.attention.reference import ReferenceAttention
from attnstore.client.base import AttendStream
from attnstore.testing import StoreProcess

LAYOUT = attnstore.PageLayout(layers=2, kv_heads=3, head_dim=64, dtype=attnstore.DType.FP32)
Q_HEADS, SCALE, PAGES = 9, 0.125, 20
NAMESPACE = attnstore.namespace(LAYOUT, model=b"attend")
HASHES = attnstore.block_hashes(NAMESPACE, range(PAGES * 16), 16)
LEASE_MS = 60_000
DEADLINE_MS = 60_000.0


@pytest.fixture(scope="module")
def pages() -> torch.Tensor:
    torch.manual_seed(11)
    return torch.randn(PAGES, *LAYOUT.shape)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[StoreProcess]]:
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as first,
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as second,
    ):
        yield [first, second]


def keep(client: attnstore.Client, pages: torch.Tensor, begin: int, end: int) -> attnstore.Lease:
    """Stores pages `[begin, end)` and leases them."""
    client.register_layout(NAMESPACE, LAYOUT)
    client.write(NAMESPACE, HASHES[begin:end], [page.numpy().tobytes() for page in pages[begin:end]])
    found = client.match(NAMESPACE, [HASHES[begin:end]], lease_ms=LEASE_MS)
    assert found.hits == (end - begin,)
    assert found.lease is not None
    return found.lease


def receive(stream: AttendStream, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.empty(rows, Q_HEADS, LAYOUT.head_dim), torch.empty(rows, Q_HEADS)
    stream.receive(memoryview(out.numpy()).cast("B"), memoryview(lse.numpy()).cast("B"))
    return out, lse


def ask(stream: AttendStream, set_id: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends from rows to layer 0."""
    stream.ask(0, [(set_id, len(query))], bytes_of(query))
    return receive(stream, len(query))


def bytes_of(query: torch.Tensor) -> memoryview:
    return memoryview(query.numpy()).cast("B")


def whole(query: torch.Tensor, pages: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ReferenceAttention().paged_attention(
        query,
        pages,
        torch.arange(len(pages), dtype=torch.int32).unsqueeze(0),
        torch.tensor([len(pages) * 16], dtype=torch.int32),
        torch.tensor([0, len(query)], dtype=torch.int32),
        layer=layer,
        scale=SCALE,
        query_positions=torch.full((len(query),), 1 << 20, dtype=torch.int32),
    )


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_node_answers_as_the_reference_does(nodes: list[StoreProcess], pages: torch.Tensor, transport: str) -> None:
    with attnstore.connect(nodes[0].url, transport=transport, deadline_ms=DEADLINE_MS) as client:
        assert client.describe().attend is not None
        lease = keep(client, pages, 0, PAGES)
        with client.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE) as stream:
            first, second = stream.open(HASHES, lease), stream.open(HASHES[:1], lease)
            for layer in range(LAYOUT.layers):
                query = torch.randn(4, Q_HEADS, LAYOUT.head_dim)
                stream.ask(layer, [(first, 3), (second, 1)], bytes_of(query))
                out, lse = receive(stream, 4)
                for rows, part in ((slice(0, 3), pages), (slice(3, 4), pages[:1])):
                    want_out, want_lse = whole(query[rows], part, layer)
                    torch.testing.assert_close(out[rows], want_out, rtol=0, atol=1e-5)
                    torch.testing.assert_close(lse[rows], want_lse, rtol=0, atol=1e-5)
            stream.close_set(second)
            with pytest.raises(errors.LeaseExpired):
                ask(stream, second, query[:1])


@pytest.mark.ipv6
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_node_on_ipv6_answers_too(pages: torch.Tensor, transport: str) -> None:
    with (
        StoreProcess("--listen", "[::1]:0", "--capacity", "64MiB", "--transports", "tcp", "--attend-threads", "1") as node,
        attnstore.connect(node.url, transport=transport, deadline_ms=DEADLINE_MS) as client,
    ):
        lease = keep(client, pages, 0, PAGES)
        with client.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE) as stream:
            query = torch.randn(2, Q_HEADS, LAYOUT.head_dim)
            out, lse = ask(stream, stream.open(HASHES, lease), query)
            want_out, want_lse = whole(query, pages, 0)
            torch.testing.assert_close(out, want_out, rtol=0, atol=1e-5)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)


def test_two_nodes_that_hold_a_half_each_answer_at_once_and_merge_to_the_whole(
    nodes: list[StoreProcess], pages: torch.Tensor
) -> None:
    with (
        attnstore.connect(nodes[0].url, transport="tcp", deadline_ms=DEADLINE_MS) as one,
        attnstore.connect(nodes[1].url, transport="tcp", deadline_ms=DEADLINE_MS) as two,
    ):
        leases = keep(one, pages, 0, 9), keep(two, pages, 9, PAGES)
        with (
            one.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE) as first,
            two.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE) as second,
        ):
            sets = first.open(HASHES[:9], leases[0]), second.open(HASHES[9:], leases[1])
            query = torch.randn(2, Q_HEADS, LAYOUT.head_dim)
            for stream, set_id in zip((first, second), sets, strict=True):
                stream.ask(1, [(set_id, 2)], bytes_of(query))
            parts = [receive(stream, 2) for stream in (first, second)]
            out, lse = merge([part[0] for part in parts], [part[1] for part in parts])
            want_out, want_lse = whole(query, pages, 1)
            torch.testing.assert_close(out, want_out, rtol=0, atol=1e-5)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_node_that_dies_between_two_queries_is_unavailable(pages: torch.Tensor, transport: str) -> None:
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node,
        attnstore.connect(node.url, transport=transport, deadline_ms=DEADLINE_MS) as client,
    ):
        lease = keep(client, pages, 0, 4)
        with client.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE) as stream:
            set_id = stream.open(HASHES[:4], lease)
            query = torch.ones(1, Q_HEADS, LAYOUT.head_dim)
            ask(stream, set_id, query)
            node.kill()
            with pytest.raises(errors.Unavailable):
                ask(stream, set_id, query)


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_node_that_attends_nothing_does_not_offer_it_and_says_so(pages: torch.Tensor, transport: str) -> None:
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "0") as node,
        attnstore.connect(node.url, transport=transport) as client,
    ):
        assert client.describe().attend is None
        lease = keep(client, pages, 0, 1)
        with pytest.raises(errors.Unsupported):
            client.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE).open(HASHES[:1], lease)


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_closed_client_ends_its_streams(nodes: list[StoreProcess], pages: torch.Tensor, transport: str) -> None:
    client = attnstore.connect(nodes[0].url, transport=transport, deadline_ms=DEADLINE_MS)
    lease = keep(client, pages, 0, 1)
    stream = client.attend(NAMESPACE, q_heads=Q_HEADS, scale=SCALE)
    stream.open(HASHES[:1], lease)
    client.close()
    with pytest.raises(errors.AttnStoreError):
        stream.open(HASHES[:1], lease)
    stream.close()
