"""Conversions between messages and our own types: lossless for ours, strict for a peer's."""

from __future__ import annotations

import pytest

from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import HASH_BYTES, HASHES_MAX
from attnstore.statistics import NamespaceStatistics, NodeStatistics
from attnstore.types import PageEvent, PageEventKind, PageStatus
from attnstore.wire import messages
from attnstore.wire.v1 import store_pb2 as pb


@pytest.mark.parametrize("dtype", DType)
def test_layouts_survive_the_wire(dtype: DType) -> None:
    layout = PageLayout(layers=3, kv_heads=2, head_dim=8, block_tokens=4, dtype=dtype, tp_rank=1, tp_size=2)
    assert messages.layout_from_wire(messages.layout_to_wire(layout)) == layout


@pytest.mark.parametrize("change", [{"layers": 0}, {"dtype": 0}, {"dtype": 9}, {"tp_rank": 2}, {"head_dim": 2**31}])
def test_layouts_that_make_no_page_are_refused(change: dict[str, int]) -> None:
    message = messages.layout_to_wire(PageLayout(layers=3, kv_heads=2, head_dim=8, tp_size=2))
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(InvalidArgument):
        messages.layout_from_wire(message)


def test_hash_lists_are_split_as_they_were_joined() -> None:
    hashes = [bytes([number]) * HASH_BYTES for number in range(5)]
    assert messages.split_hashes(messages.join_hashes(hashes)) == hashes
    assert messages.split_hashes(b"") == []
    for joined in (b"x", bytes(HASH_BYTES * (HASHES_MAX + 1))):
        with pytest.raises(InvalidArgument):
            messages.split_hashes(joined)


@pytest.mark.parametrize("kind", PageEventKind)
def test_events_survive_the_wire(kind: PageEventKind) -> None:
    event = PageEvent(kind, b"h" * HASH_BYTES, 7, 3)
    assert messages.event_from_wire(messages.event_to_wire(event)) == event


def test_events_and_verdicts_of_another_world_are_protocol_errors() -> None:
    with pytest.raises(ProtocolError, match="kind"):
        messages.event_from_wire(pb.PageEvent())
    assert messages.statuses_from_wire([4, 5], 2) == (PageStatus.STORED, PageStatus.ALREADY_PRESENT)
    for numbers in ([4], [4, 5, 5], [4, 77], [4, 0]):
        with pytest.raises(ProtocolError):
            messages.statuses_from_wire(numbers, 2)


def test_statistics_survive_the_wire() -> None:
    layout = PageLayout(layers=3, kv_heads=2, head_dim=8)
    names = [name for name in NodeStatistics.__dataclass_fields__ if name not in ("node_id", "epoch", "namespaces")]
    statistics = NodeStatistics(
        node_id="ada",
        epoch=bytes(16),
        namespaces=(NamespaceStatistics(bytes(HASH_BYTES), layout, 9),),
        **{name: number for number, name in enumerate(names)},
    )
    assert messages.statistics_from_wire(messages.statistics_to_wire(statistics)) == statistics


@pytest.mark.parametrize("method", messages.METHODS.values(), ids=lambda method: method.name)
def test_bytes_that_are_no_message_are_protocol_errors(method: messages.Method) -> None:
    for decode, is_chunk in ((method.decode_request, method.name == "Write"), (method.decode_response, method.name == "Read")):
        if is_chunk:
            assert decode(b"\xff") == b"\xff", "page chunks are coded elsewhere"
        else:
            with pytest.raises(ProtocolError, match="not a valid"):
                decode(b"\xff")
