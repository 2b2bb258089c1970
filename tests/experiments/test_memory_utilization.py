"""The memory experiment: its requests, the allocator of its baselines, and a run of each policy on a simulated clock."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore_worker.model import LoadedModel
from experiments.memory_utilization.__main__ import main
from experiments.memory_utilization.measure import POLICIES, Figures, Window, measure
from experiments.memory_utilization.report import sustained_rate
from experiments.memory_utilization.reservation import ContiguousReservation
from experiments.memory_utilization.workload import Request, Shape, requests

SHAPE = Shape().shrunk(4)


class TickingClock:
    """Every reading advances it by 20 ms, so that a run has the same steps on every machine."""

    def __init__(self) -> None:
        self._now_ms = 0.0

    def now_ms(self) -> float:
        self._now_ms += 20.0
        return self._now_ms


def figures(rate_per_s: float, latency_ms: float, unfinished: int = 0) -> Figures:
    return Figures("paged", rate_per_s, 1.0, 1.0, 1.0, 1.0, latency_ms, 10, unfinished, 0)


def test_lengths_have_the_papers_means_and_stay_within_the_limit() -> None:
    stream = requests(Shape(), rate_per_s=1.0, until_s=6_400.0, vocabulary=49_152, seed=3)
    assert fmean(len(request.prompt) for request in stream) == pytest.approx(161, rel=0.02)
    assert fmean(request.output_tokens for request in stream) == pytest.approx(338, rel=0.02)
    assert max(request.total_tokens for request in stream) <= Shape().total_max == 2048
    assert len(stream) == pytest.approx(6_400, rel=0.05)
    assert all(earlier.arrival_s < later.arrival_s for earlier, later in pairwise(stream))


def test_the_same_seed_gives_the_same_requests() -> None:
    first, again, other = (requests(SHAPE, 2.0, 30.0, 49_152, seed) for seed in (5, 5, 6))
    plain = [[(each.arrival_s, each.prompt, each.output_tokens) for each in stream] for stream in (first, again, other)]
    assert plain[0] == plain[1] != plain[2]


def test_shrinking_keeps_the_blocks_share_of_a_sequence() -> None:
    assert SHAPE.block_tokens / SHAPE.output_mean == pytest.approx(Shape().block_tokens / Shape().output_mean)
    assert SHAPE.total_max == 512


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.integers(0, 50)), max_size=60))
def test_ranges_never_overlap_and_all_memory_comes_back(steps: list[tuple[int, bool, int]]) -> None:
    reservation = ContiguousReservation(64, lambda request: request.total_tokens)
    held: list[Request] = []
    for tokens, give_back, index in steps:
        request = Request(0.0, [1], tokens)
        if give_back and held:
            reservation.release(held.pop(index % len(held)))
        elif reservation.reserve(request):
            held.append(request)
        assert reservation.reserved_slots([]) == sum(each.total_tokens for each in held) <= 64
    for request in held:
        reservation.release(request)
    assert reservation.reserve(Request(0.0, [1], 63)), "the gaps were joined again"
    assert not reservation.reserve(Request(0.0, [], 1))


def test_a_gap_too_small_is_not_used() -> None:
    reservation = ContiguousReservation(10, lambda request: request.total_tokens)
    first, second, third = (Request(0.0, [1], 2) for _ in range(3))
    assert reservation.reserve(first)
    assert reservation.reserve(second)
    assert reservation.reserve(third)
    reservation.release(first)
    assert not reservation.reserve(Request(0.0, [1], 3)), "four slots are free, three of them in one piece"
    assert reservation.reserve(Request(0.0, [1], 2))


def test_pages_hold_more_sequences_in_the_same_memory(tiny: LoadedModel) -> None:
    window = Window(warm_up_s=0.8, measured_s=1.6, drain_s=0.0)
    stream = requests(SHAPE, 40.0, window.end_s, 49_152, seed=2)
    got = {policy: measure(tiny, policy, SHAPE, 2048, stream, 40.0, window, TickingClock()) for policy in POLICIES}
    assert got["contiguous_max"].mean_batch == pytest.approx(4, abs=0.2)
    assert got["contiguous_max"].mean_batch < got["contiguous_known"].mean_batch < got["paged"].mean_batch
    assert got["contiguous_max"].utilization < got["contiguous_known"].utilization < got["paged"].utilization
    assert got["paged"].utilization > 0.95
    assert all(each.memory_utilization <= each.utilization <= 1 for each in got.values())


def test_a_load_that_is_served_is_finished(tiny: LoadedModel) -> None:
    window = Window(warm_up_s=0.0, measured_s=4.0, drain_s=60.0)
    stream = requests(SHAPE, 2.0, window.end_s, 49_152, seed=4)
    got = measure(tiny, "contiguous_known", SHAPE, 2048, stream, 2.0, window, TickingClock())
    assert got.arrived == len(stream) > 0
    assert got.unfinished == 0
    assert got.normalized_latency_ms >= 20


def test_the_sustained_rate_is_the_last_before_the_limit_is_passed() -> None:
    sweep = [figures(0.5, 20), figures(1.0, 90), figures(2.0, 400), figures(3.0, 50)]
    assert sustained_rate(sweep, "paged", 100) == 1.0
    assert sustained_rate(sweep, "paged", 10) is None
    assert sustained_rate([figures(0.5, 20), figures(1.0, 20, unfinished=1)], "paged", 100) == 0.5
    assert sustained_rate(sweep, "contiguous_max", 100) is None


@pytest.mark.slow
def test_the_command_writes_the_figures_of_the_real_model(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["--quick", "--threads", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert {"utilization", "mean_batch", "tokens_per_s", "normalized_latency_ms"} <= written["paged"].keys()
    assert written["contiguous_max"]["utilization"] < written["contiguous_known"]["utilization"] < written["paged"]["utilization"]
    assert written["setting"]["shrink"] == 4


def test_a_missing_model_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--model", str(tmp_path / "absent")]) == 2
    assert "no such file" in capsys.readouterr().err
