"""Whatever a writer sends, a page is sealed only if it is the announced one, and every slot is accounted for."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.arena import MemoryArena
from attnstore.core.hashing import layer_checksums, page_checksum, range_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import PageTable
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import HASH_BYTES, HASHES_MAX
from attnstore.server.ingest import Ingest
from attnstore.server.store import Store
from attnstore.testing import ManualClock
from attnstore.types import PageStatus, Space

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=1, dtype=DType.OPAQUE)
SIZE = LAYOUT.page_bytes
SPACE = Space("default", b"n" * HASH_BYTES)
SLOTS = 4


def name(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "big")


def make_store() -> Store:
    ids = count()
    table = PageTable(capacity_bytes=SLOTS * SIZE, extent_bytes=SLOTS * SIZE, new_lease_id=lambda: next(ids).to_bytes(16, "big"))
    store = Store(table, MemoryArena(SLOTS * SIZE, SLOTS * SIZE), ManualClock(), lambda events: None)  # noqa: ARG005
    store.spaces.register(SPACE, LAYOUT)
    return store


def make_ingest(store: Store) -> Ingest:
    return Ingest(store, SPACE)


def test_a_page_in_pieces_is_sealed_with_its_last_byte() -> None:
    store = make_store()
    ingest = make_ingest(store)
    page = bytes(range(SIZE))
    ingest.begin(name(1), page_checksum(page))
    ingest.receive(0, memoryview(page)[:5])
    with store.reading_all(SPACE, [name(1)], None) as [found]:
        assert found is PageStatus.MISSING, "nothing half-written is visible"
    ingest.receive(5, memoryview(page)[5:])
    with store.reading_all(SPACE, [name(1)], None) as [found]:
        assert not isinstance(found, PageStatus)
        assert found.slice(0, SIZE) == (page, page_checksum(page))
        assert found.slice(8, 16) == (page[8:], range_checksum(layer_checksums(page[8:], LAYOUT.layer_bytes)))
    assert ingest.finish() == (PageStatus.STORED,)


def test_every_verdict_has_its_cause() -> None:
    store = make_store()
    ingest = make_ingest(store)
    page = bytes(range(SIZE))
    for number, checksum, payload in (
        (1, page_checksum(page), page),
        (1, page_checksum(page), page),
        (2, page_checksum(page) ^ 1, page),
        (3, page_checksum(page), page[:-1]),
        (4, page_checksum(page), page + b"x"),
        (5, page_checksum(page), page),
    ):
        ingest.begin(name(number), checksum)
        ingest.receive(0, memoryview(payload))
    assert ingest.finish() == (
        PageStatus.STORED,
        PageStatus.ALREADY_PRESENT,
        PageStatus.CHECKSUM_MISMATCH,
        PageStatus.WRONG_SIZE,
        PageStatus.WRONG_SIZE,
        PageStatus.STORED,
    )
    assert (store.statistics().pages_sealed, store.statistics().pages_arriving) == (2, 0)


def test_closing_gives_an_unfinished_slot_back_and_may_be_repeated() -> None:
    store = make_store()
    ingest = make_ingest(store)
    ingest.begin(name(1), 0)
    ingest.receive(0, memoryview(b"abc"))
    assert store.statistics().used_bytes == SIZE
    for _ in range(2):
        ingest.close()
        assert store.statistics().used_bytes == 0


def test_bytes_out_of_place_are_protocol_errors() -> None:
    ingest = make_ingest(make_store())
    with pytest.raises(ProtocolError, match="before the hash"):
        ingest.receive(0, memoryview(b"abc"))
    ingest.begin(name(1), page_checksum(bytes(SIZE)))
    with pytest.raises(ProtocolError, match="offset 1"):
        ingest.receive(1, memoryview(b"abc"))
    ingest.receive(0, memoryview(bytes(SIZE)))
    with pytest.raises(ProtocolError, match="more than"):
        ingest.receive(SIZE, memoryview(b"x"))
    with pytest.raises(InvalidArgument, match="32"):
        ingest.begin(b"short", 0)


def test_one_stream_carries_a_bounded_number_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore.server.ingest.HASHES_MAX", 3)
    ingest = make_ingest(make_store())
    for number in range(3):
        ingest.begin(name(number), 0)
    with pytest.raises(InvalidArgument, match="3 pages"):
        ingest.begin(name(3), 0)
    assert HASHES_MAX > 3


PIECES = st.lists(
    st.tuples(st.just("begin"), st.integers(0, 6), st.booleans())
    | st.tuples(st.just("receive"), st.integers(0, SIZE + 1), st.integers(0, SIZE + 1)),
    max_size=30,
)


@given(st.lists(PIECES, max_size=3))
def test_slots_are_conserved_whatever_writers_send(streams: list[list[tuple[str, int, int]]]) -> None:
    store = make_store()
    page = bytes(range(SIZE))
    for stream in streams:
        ingest = make_ingest(store)
        try:
            for verb, first, second in stream:
                if verb == "begin":
                    ingest.begin(name(first), page_checksum(page) if second else 0)
                else:
                    ingest.receive(first, memoryview(page)[first:second])
            ingest.finish()
        except ProtocolError:
            pass
        finally:
            ingest.close()
        store._table.check()
        now = store.statistics()
        assert (now.pages_arriving, now.used_bytes) == (0, now.pages_sealed * SIZE)
        for number in range(7):
            with store.reading_all(SPACE, [name(number)], None) as [found]:
                assert found is PageStatus.MISSING or found.slice(0, SIZE)[0] == page  # type: ignore[union-attr]
