"""Layers over the tcp transport are reported in order, once, and only when they have arrived, whatever the node sends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnstore import PageStatus
from attnstore.core.hashing import layer_checksums
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import (
    CHANNEL_GATHER_PAGES,
)
from attnstore.wire.page_channel import Order, encode_slice
from tests.channels import ChannelNode, NodeEnd, Script, clean_node, pages_of, read, read_plan, scripted
from tests.samples import SMALL, make_batch

OK, MISSING, CORRUPT = PageStatus.OK, PageStatus.MISSING, PageStatus.CORRUPT
LAYER = SMALL.layer_bytes


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


def test_layers_are_told_of_in_order_once_each_and_only_when_they_are_there(node: ChannelNode) -> None:
    pages = CHANNEL_GATHER_PAGES + 3
    batch = make_batch(pages, model="on layer")
    node.keep(batch)
    buffers = batch.buffers()
    seen: list[tuple[int, int]] = []

    def on_layer(layer: int, count: int) -> None:
        seen.append((layer, count))
        upto = (layer + 1) * LAYER
        assert [buffer[:upto] for buffer in buffers[:count]] == [page[:upto] for page in batch.pages[:count]]

    transport = node.transport(channels=4)
    plan = read_plan(batch, buffers, on_layer=on_layer)
    transport.read(plan).wait()
    assert seen == [(layer, pages) for layer in range(SMALL.layers)]
    assert plan.landing.result().leading_hits == pages
    transport.close()


@pytest.mark.parametrize("missing", [{0}, {1}, {3}, {0, 3}, {1, 2}, {0, 1, 2, 3}])
def test_on_layer_counts_the_leading_pages_before_the_first_miss(node: ChannelNode, missing: set[int]) -> None:
    batch = make_batch(4, model="on layer with misses")
    node.keep(batch)
    node.store.spaces.delete(batch.space, [batch.hashes[index] for index in missing])
    seen: list[tuple[int, int]] = []
    transport = node.transport()
    result, buffers = read(transport, batch, on_layer=lambda *told: seen.append(told))
    assert seen == [(layer, min(missing)) for layer in range(SMALL.layers)]
    assert result.statuses == tuple(MISSING if index in missing else OK for index in range(4))
    assert all(buffers[index] == batch.pages[index] for index in range(4) if index not in missing)
    transport.close()


def test_what_on_layer_raises_reaches_the_caller_and_costs_the_connection(node: ChannelNode) -> None:
    batch = make_batch(2, model="on layer raises")
    node.keep(batch)
    transport = node.transport()

    def on_layer(_layer: int, _pages: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=on_layer)).wait()
    assert read(transport, batch)[0].leading_hits == 2
    transport.close()


def layers_of(*slices: tuple[int, int, bytes]) -> Script:
    """Returns a node that answers a read by layers with `(page, layer, bytes)` each, with right checksums."""

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        assert frame.order is Order.LAYERS
        for page, layer, data in slices:
            end.layer(frame.request, page, data, LAYER, layer)
        end.next_request()

    return serve


FULL = bytes(LAYER)


@pytest.mark.parametrize(
    "slices",
    [
        [(0, 0, FULL), (0, 1, FULL)],
        [(0, 0, FULL), (0, 0, FULL)],
        [(1, 0, FULL)],
        [(0, 1, FULL * 2)],
        [(0, 0, FULL * 2), (0, 0, FULL * 2)],
        [(0, 0, FULL * 3)],
        [(0, 0, FULL[:-1])],
        [(2, 0, FULL)],
        [(2**32 - 1, 0, FULL)],
    ],
    ids=str,
)
def test_layers_that_do_not_come_in_turn_break_the_protocol_before_anybody_is_told(slices: list[tuple[int, int, bytes]]) -> None:
    batch = make_batch(2, model="layers out of turn")
    told: list[tuple[int, int]] = []
    with scripted(layers_of(*slices)) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda *layer: told.append(layer))).wait()
    assert all(layer == (0, 2) for layer in told)
    assert len(told) <= 1


def test_a_node_cannot_gather_more_pages_than_agreed() -> None:
    pages = CHANNEL_GATHER_PAGES + 1
    batch = make_batch(pages, model="gather")
    with scripted(layers_of((0, 0, FULL * pages))) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda _layer, _pages: None)).wait()


def test_a_corrupt_layer_stops_the_count_there_and_marks_its_pages() -> None:
    batch = make_batch(3, model="corrupt layer")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        for layer in range(SMALL.layers):
            for index, page in enumerate(batch.pages):
                data = page[layer * LAYER : (layer + 1) * LAYER]
                end.layer(frame.request, index, data, LAYER, layer, wrong=int((index, layer) == (1, 0)))
        end.next_request()

    told: list[tuple[int, int]] = []
    with scripted(serve) as transport:
        result, buffers = read(transport, batch, on_layer=lambda *layer: told.append(layer))
    assert result.statuses == (OK, CORRUPT, OK)
    assert told == [(0, 1), (1, 1)]
    assert (buffers[0], buffers[2]) == (batch.pages[0], batch.pages[2])


def test_of_pages_that_come_together_only_the_corrupt_one_is_marked() -> None:
    batch = make_batch(3, model="corrupt among others")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        for layer in range(SMALL.layers):
            row = bytearray(b"".join(page[layer * LAYER : (layer + 1) * LAYER] for page in batch.pages))
            header = encode_slice(frame.request, 0, len(row) + 3 * 8, layer * LAYER, 0)
            sealed = layer_checksums(row, LAYER)
            row[LAYER] ^= layer
            end.stream.send(header, sealed, row)
        end.next_request()

    told: list[tuple[int, int]] = []
    with scripted(serve) as transport:
        result, buffers = read(transport, batch, on_layer=lambda *layer: told.append(layer))
    assert result.statuses == (OK, CORRUPT, OK)
    assert told == [(0, 3), (1, 1)]
    assert (buffers[0], buffers[2]) == (batch.pages[0], batch.pages[2])


def test_a_node_cannot_name_a_layer_through_a_page_that_is_corrupt_already() -> None:
    batch = make_batch(1, model="corrupt and lying")
    told: list[tuple[int, int]] = []

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.layer(frame.request, 0, FULL, LAYER, 0, wrong=1)
        end.layer(frame.request, 0, FULL, LAYER, 9)
        end.next_request()

    with scripted(serve) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda *layer: told.append(layer))).wait()
    assert told == [(0, 0)]


def test_a_node_that_takes_fewer_pages_by_layer_is_not_asked_for_more() -> None:
    batch = make_batch(3, model="fewer")
    with scripted(pages_of(batch), hashes_max=2) as transport:
        with pytest.raises(InvalidArgument):
            transport.read(read_plan(batch, batch.buffers(), on_layer=lambda _layer, _pages: None)).wait()
        assert read(transport, batch)[0].leading_hits == 3
