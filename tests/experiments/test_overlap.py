"""The overlap experiment finds only the intended pages in the store, and computes the rest correctly."""

from __future__ import annotations

from attnstore_worker.model import LoadedModel
from experiments.overlap import Shape, measure


def test_every_repetition_computes_its_chunk_and_all_ways_give_its_tokens(tiny: LoadedModel) -> None:
    rows = measure(tiny, Shape(hit_tokens=128, chunk_tokens=64, repetitions=2), (1.0, 2.0))
    assert [row.tokens_equal for row in rows] == [True, True]
    assert all(row.sequential_ttft_ms > row.transfer_ms > 0 for row in rows)
