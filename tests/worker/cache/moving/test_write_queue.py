"""Write-behind: order, cancellation and the promise that each accepted block is reported once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from attnstore.core.hashing import BlockHash
from attnstore_worker.cache.moving.write_queue import WRITE_BATCH_PAGES_MAX, WriteQueue

WAIT_MS = 10_000


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


class Recorder:
    """A write that waits at a gate, so that a test can look at the queue while it is full."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.entered = threading.Event()
        self.gate = threading.Event()

    def __call__(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        assert [name(block_id) for block_id in block_ids] == list(hashes)
        self.entered.set()
        self.gate.wait()
        self.written += block_ids


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    write = Recorder()
    yield write
    write.gate.set()


def test_blocks_are_written_in_order_and_reported_once(recorder: Recorder) -> None:
    queue = WriteQueue(recorder, pages_max=100)
    recorder.gate.set()
    assert all(queue.offer(name(block_id), block_id) for block_id in range(80))
    assert queue.flush(WAIT_MS)
    assert recorder.written == list(range(80))
    assert sorted(queue.take_finished()) == list(range(80))
    assert queue.take_finished() == []
    queue.close()


def test_a_full_queue_refuses_and_a_cancelled_block_is_not_written(recorder: Recorder) -> None:
    queue = WriteQueue(recorder, pages_max=3)
    assert queue.offer(name(0), 0)
    assert recorder.entered.wait(WAIT_MS / 1e3)
    assert [queue.offer(name(block_id), block_id) for block_id in range(1, 5)] == [True, True, False, False]
    assert queue.queued(lambda block_id: block_id == 1) == 1
    assert queue.cancel_newest(lambda block_id: block_id == 1) == 1
    assert queue.offer(name(3), 3)
    assert queue.cancel_newest(lambda _: True) == 3
    assert queue.pending == 2
    recorder.gate.set()
    assert queue.flush(WAIT_MS)
    assert recorder.written == [0, 2]
    assert queue.cancel_newest(lambda _: True) is None
    queue.close()


def test_a_block_being_written_cannot_be_cancelled_and_flush_gives_up_in_time(recorder: Recorder) -> None:
    queue = WriteQueue(recorder, pages_max=3)
    queue.offer(name(0), 0)
    assert recorder.entered.wait(WAIT_MS / 1e3)
    assert queue.cancel_newest(lambda _: True) is None
    assert not queue.flush(1)
    assert queue.take_finished() == []
    recorder.gate.set()
    assert queue.wait_finished(WAIT_MS)
    assert queue.take_finished() == [0]
    queue.close()


def test_closing_gives_queued_blocks_back_and_keeps_the_one_being_written(recorder: Recorder) -> None:
    queue = WriteQueue(recorder, pages_max=WRITE_BATCH_PAGES_MAX * 3)
    queue.offer(name(0), 0)
    assert recorder.entered.wait(WAIT_MS / 1e3)
    for block_id in range(1, 4):
        queue.offer(name(block_id), block_id)
    queue.close()
    assert queue.take_finished() == [1, 2, 3]
    recorder.gate.set()
    assert queue.wait_finished(WAIT_MS)
    assert queue.take_finished() == [0]
    assert recorder.written == [0]


def test_a_write_that_raises_is_reported_too_and_the_next_blocks_are_written() -> None:
    written: list[int] = []

    def write(_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        if 0 in block_ids:
            raise OverflowError("a store's mistake")
        written.extend(block_ids)

    queue = WriteQueue(write, pages_max=100)
    queue.offer(name(0), 0)
    assert queue.flush(WAIT_MS)
    queue.offer(name(1), 1)
    assert queue.flush(WAIT_MS)
    assert (sorted(queue.take_finished()), written) == ([0, 1], [1])
    queue.close()
