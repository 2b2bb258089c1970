"""Pages land in the given buffers and are verified there; a broken peer changes no byte outside of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.client.landing import Landing, readable_view
from attnstore.core.hashing import page_checksum
from attnstore.errors import BufferMismatch, ProtocolError, Unavailable
from attnstore.types import PageStatus
from attnstore.wire.chunks import ReadChunk

SIZE = 24


def chunk(index: int, page: bytes, begin: int, end: int) -> ReadChunk:
    return ReadChunk(index, PageStatus.OK, len(page), begin, page_checksum(page), memoryview(page)[begin:end])


def test_chunks_of_many_pages_may_be_mixed() -> None:
    pages = [bytes([number]) * SIZE for number in (1, 2, 3)]
    buffers = [bytearray(SIZE) for _ in pages]
    landing = Landing(3, buffers, SIZE)
    for begin in range(0, SIZE, 8):
        for index, page in enumerate(pages):
            landing.take(chunk(index, page, begin, begin + 8))
    landing.require_complete()
    assert landing.result().statuses == (PageStatus.OK,) * 3
    assert buffers == pages


def test_what_is_not_complete_is_incomplete_and_said_to_be_unanswered() -> None:
    landing = Landing(3, [bytearray(SIZE) for _ in range(3)], SIZE)
    landing.take(chunk(0, bytes(SIZE), 0, SIZE))
    landing.take(chunk(1, bytes(SIZE), 0, 8))
    with pytest.raises(ProtocolError, match="2 of 3 pages unanswered"):
        landing.require_complete()
    error = Unavailable("gone")
    result = landing.result(error)
    assert result.statuses == (PageStatus.OK, PageStatus.INCOMPLETE, PageStatus.INCOMPLETE)
    assert (result.bytes_read, result.leading_hits, result.error) == (SIZE, 1, error)


def test_a_restart_forgets_what_had_landed() -> None:
    landing = Landing(1, [bytearray(SIZE)], SIZE)
    landing.take(chunk(0, bytes(SIZE), 0, SIZE))
    landing.begin("tcp")
    assert landing.result().statuses == (PageStatus.INCOMPLETE,)
    landing.take(chunk(0, bytes(SIZE), 0, SIZE))
    assert landing.result().statuses == (PageStatus.OK,)


@given(
    st.lists(
        st.builds(
            ReadChunk,
            st.integers(0, 4),
            st.sampled_from(PageStatus),
            st.sampled_from([0, SIZE - 1, SIZE, 2**64 - 1]),
            st.integers(0, SIZE) | st.just(2**64 - 1),
            st.integers(0, 2**64 - 1),
            st.binary(max_size=2 * SIZE).map(memoryview),
        ),
        max_size=12,
    )
)
def test_no_sequence_of_chunks_writes_outside_the_buffers_or_makes_a_wrong_page_ok(chunks: list[ReadChunk]) -> None:
    guard = b"\xa5" * SIZE
    block = bytearray(guard + bytes(SIZE) + guard + bytes(SIZE) + guard)
    view = memoryview(block)
    windows = [view[SIZE : 2 * SIZE], view[3 * SIZE : 4 * SIZE]]
    landing = Landing(2, windows, SIZE)
    announced: dict[int, set[int]] = {0: set(), 1: set()}
    for piece in chunks:
        try:
            landing.take(piece)
        except ProtocolError:
            break
        announced[piece.page_index].add(piece.checksum)
    assert block[:SIZE] == block[2 * SIZE : 3 * SIZE] == block[4 * SIZE :] == guard
    for index, status in enumerate(landing.result().statuses):
        assert status is not PageStatus.OK or page_checksum(windows[index]) in announced[index]


@pytest.mark.parametrize(
    "buffer",
    [bytearray(SIZE - 1), bytes(SIZE), memoryview(bytearray(2 * SIZE))[::2], 7, "x" * SIZE],
    ids=["short", "read-only", "scattered", "no buffer", "text"],
)
def test_buffers_that_do_not_fit_are_refused(buffer: object) -> None:
    with pytest.raises(BufferMismatch, match="buffer 0"):
        Landing(1, [buffer], SIZE)  # type: ignore[list-item]


def test_the_number_of_buffers_is_that_of_the_pages() -> None:
    with pytest.raises(BufferMismatch, match="one for each page"):
        Landing(2, [bytearray(SIZE)], SIZE)


def test_pages_to_write_are_flat_bytes_of_the_right_size() -> None:
    np = pytest.importorskip("numpy")
    page = np.arange(6, dtype="<f4").reshape(2, 3)
    assert bytes(readable_view(0, page, SIZE)) == page.tobytes()
    for wrong in (page[:, ::2], page[:1], np.zeros(3, dtype="M8[s]")):
        with pytest.raises(BufferMismatch):
            readable_view(0, wrong, SIZE)
