"""The inputs of steps on a device: what is there after each step is what the sequences say, and only what changed is sent."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.base import Device, Event, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.sequence import Chunk, Sequence
from attnstore_worker.engine.step_tables import NO_SLOT, Inputs, Sizes, StepTables
from attnstore_worker.errors import OutOfDeviceMemory

BLOCK_TOKENS = 4
SIZES = Sizes(tokens=64, sequences=8, blocks=12)


def sequence(number: int, block_ids: list[int], tokens: int) -> Sequence:
    ids = [100 * number + position for position in range(tokens)]
    made = Sequence(number, ids, tokens, SamplingParams(seed=number, top_k=number or None), 0.0)
    made.table = BlockTable(BLOCK_TOKENS, list(block_ids))
    return made


def chunk(of: Sequence, begin: int, end: int, drafts: tuple[int, ...] = ()) -> Chunk:
    return Chunk(of, begin, end, drafts)


def agrees(inputs: Inputs, chunks: list[Chunk], block_tokens: int = BLOCK_TOKENS) -> None:
    """Compares every value that a step reads with its chunks."""
    starts = inputs.query_starts.tolist()
    rows = iter(inputs.rows.tolist())
    for each in chunks:
        table, end = each.sequence.table, each.end + len(each.drafts)
        assert table is not None
        found = [row for row in range(len(starts) - 1) if token_ids(inputs, starts, row) == each.token_ids()]
        [row] = [row for row in found if int(inputs.context_lens[row]) == end]
        part = slice(starts[row], starts[row + 1])
        assert inputs.positions[part].tolist() == list(range(each.begin, end))
        blocks, offsets = table.slot_mapping(each.begin, end)
        assert (inputs.slot_blocks[part].tolist(), inputs.slot_offsets[part].tolist()) == (blocks, offsets)
        needed = -(-end // block_tokens)
        assert inputs.block_tables[row, :needed].tolist() == table.block_ids[:needed]
        if each.gives_token:
            asked = [next(rows) for _ in range(1 + len(each.drafts))]
            assert asked == list(range(part.stop - len(asked), part.stop))
    assert next(rows, None) is None


def token_ids(inputs: Inputs, starts: list[int], row: int) -> list[int]:
    tokens: list[int] = inputs.token_ids[starts[row] : starts[row + 1]].tolist()
    return tokens


@pytest.fixture(params=["host", "simulated"])
def device(request: pytest.FixtureRequest) -> Device:
    return HostDevice() if request.param == "host" else SimulatedDevice("late")


def test_a_mixed_step_is_what_its_chunks_say(device: Device) -> None:
    tables = StepTables(device, SIZES)
    chunks = [
        chunk(sequence(1, [5, 6, 7], 10), 4, 10),
        chunk(sequence(2, [9], 3), 2, 3, (8, 8)),
        chunk(sequence(3, [1, 2], 8), 0, 4),
    ]
    chunks[1].sequence.table.block_ids.append(11)  # type: ignore[union-attr]
    inputs = tables.fill(chunks)
    agrees(inputs, chunks)
    assert inputs.seeds.tolist() == [1, 2, 2, 2]
    assert inputs.drawn_at.tolist() == [10, 3, 4, 5]
    assert inputs.top_ks.tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_of_sequences_agree(seed: int) -> None:
    """Sequences grow, end, come back with other blocks, and leave steps out."""
    rng = random.Random(seed)
    tables = StepTables(SimulatedDevice("late"), SIZES)
    running: list[Sequence] = []
    for number in range(40):
        if len(running) < 6 and rng.random() < 0.5:
            tokens = rng.randint(1, 20)
            running.append(sequence(number, rng.sample(range(50), -(-tokens // BLOCK_TOKENS)), tokens))
        for each in list(running):
            table = each.table
            assert table is not None
            if rng.random() < 0.1:
                running.remove(each)
                each.table = None
            elif rng.random() < 0.1:  # preempted, and admitted again with other blocks
                table.block_ids[:] = rng.sample(range(50), len(table.block_ids))
            elif len(each.token_ids) < SIZES.blocks * BLOCK_TOKENS:
                each.token_ids.append(100 * each.sequence_id + len(each.token_ids))
                if len(each.token_ids) > table.capacity_tokens:
                    table.block_ids.append(rng.randrange(50))
        stepping = [each for each in running if rng.random() < 0.8]
        if not stepping:
            continue
        if rng.random() < 0.5:
            chunks = [chunk(each, len(each.token_ids) - 1, len(each.token_ids)) for each in stepping]
            rows = tables.decode_rows(chunks)
            inputs = tables.fill(chunks, decode_rows=max(rows, rng.choice([rows, 8])))
            padded = inputs.context_lens == 0
            assert inputs.slot_blocks[padded].tolist() == [NO_SLOT] * int(padded.sum())
            assert inputs.query_starts.tolist() == list(range(len(inputs.context_lens) + 1))
        else:
            chunks = [chunk(each, rng.randrange(len(each.token_ids)), len(each.token_ids)) for each in stepping]
            if sum(each.tokens for each in chunks) > SIZES.tokens:
                continue
            inputs = tables.fill(chunks)
        agrees(inputs, chunks)


class CountingDevice(HostDevice):
    """Counts the transfers and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes: list[int] = []

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        self.sent_bytes.append(source.nbytes)
        return super().transfer(source, target)


@pytest.mark.parametrize("sequences", [1, 64])
def test_a_decode_step_sends_what_its_batch_needs_whatever_the_contexts(sequences: int) -> None:
    """And 12 bytes for each new block, up to alignment."""
    device = CountingDevice()
    tables = StepTables(device, Sizes(tokens=2_000, sequences=72, blocks=513))

    def step_bytes(running: list[Sequence]) -> int:
        device.sent_bytes.clear()
        chunks = [chunk(each, len(each.token_ids) - 1, len(each.token_ids)) for each in running]
        agrees(tables.fill(chunks, decode_rows=sequences), chunks, 16)
        [sent_bytes] = device.sent_bytes
        return sent_bytes

    steady = []
    for tokens in (15, 8191):
        running = [sequence(1 + number, [], tokens) for number in range(sequences)]
        for each in running:
            each.table = BlockTable(16, list(range(-(-tokens // 16))))
        tables.fill([chunk(each, tokens - 1, tokens) for each in running], decode_rows=sequences)
        steady.append(step_bytes(running))
        running[0].token_ids += [7, 7]
        running[0].table.block_ids.append(9)  # type: ignore[union-attr]
        assert steady[-1] < step_bytes(running) <= steady[-1] + 2 * 16
        for each in running:
            each.table = None
    assert steady[0] == steady[1] <= 96 * sequences + 128


def test_more_changes_than_one_transfer_holds_all_arrive() -> None:
    sizes = Sizes(tokens=8, sequences=4, blocks=6_000)
    tables = StepTables(HostDevice(), sizes)
    long = sequence(1, list(range(6_000)), 1)
    inputs = tables.fill([chunk(long, 0, 1)])
    assert torch.equal(inputs.block_tables[0], torch.arange(6_000, dtype=torch.int32))


def test_after_a_transfer_that_failed_every_block_table_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    tables = StepTables(device, SIZES)
    one, other = sequence(1, [3, 4], 5), sequence(2, [5], 2)
    tables.fill([chunk(one, 4, 5)])
    with monkeypatch.context() as patched:
        patched.setattr(device, "transfer", _refused)
        with pytest.raises(OutOfDeviceMemory):
            tables.fill([chunk(one, 4, 5), chunk(other, 1, 2)])
    again = [chunk(one, 4, 5), chunk(other, 1, 2)]
    agrees(tables.fill(again), again)


def _refused(*_: object) -> None:
    raise OutOfDeviceMemory("on purpose")


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("device", ["simulated"], indirect=True)
def test_steps_that_draft_compute_one_token_later_each_in_blocks_that_are_there(device: Device, rows: int | None) -> None:
    tables = StepTables(device, SIZES)
    short, long = sequence(1, [3, 4], 5), sequence(2, [5, 6, 7], 7)
    chunks = [chunk(long, 6, 7), chunk(short, 4, 5)]
    for ahead, inputs in enumerate(tables.fill_drafts(chunks, [4, 2], rows)):
        known = []
        for each in chunks[: 2 if ahead < 2 else 1]:
            table = each.sequence.table
            assert table is not None
            copied = sequence(each.sequence.sequence_id, table.block_ids, each.end + ahead)
            known.append(chunk(copied, each.begin + ahead, each.end + ahead))
        written = torch.tensor([each.token_ids()[0] for each in known])
        inputs.token_ids.index_put_((inputs.rows,), written)
        agrees(inputs, known)
        assert int((inputs.context_lens > 0).sum()) == len(known)
    assert ahead == 3
    agrees(tables.fill(chunks), chunks)


def test_padding_asks_for_every_row_and_stores_nothing() -> None:
    inputs = StepTables(HostDevice(), SIZES).padding(4)
    assert inputs.slot_blocks.tolist() == [NO_SLOT] * 4
    assert inputs.context_lens.tolist() == [0] * 4
    assert len(inputs.rows) == 4


def test_without_its_wait_a_set_is_refilled_while_it_is_read() -> None:
    tables = StepTables(SimulatedDevice("late", without=Wait.TABLES_AFTER_STEP), SIZES)
    one = sequence(1, [3], 2)
    for _ in range(2):
        tables.fill([chunk(one, 1, 2)])
    with pytest.raises(Unsynchronised):
        tables.fill([chunk(one, 1, 2)])
