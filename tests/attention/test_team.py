"""Work on several threads at once: on torch's, on our own, and at barriers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numba import njit

from attnstore.attention import team
from attnstore.attention.barrier import meet, take

Run = Callable[[int, Callable[[int], None]], None]


def no_work(_: int) -> None:
    """Does nothing."""


@pytest.fixture(params=["torch's threads", "threads of our own", "no OpenMP"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    if request.param == "threads of our own":
        return team.run_apart
    if request.param == "no OpenMP":
        monkeypatch.setattr(team, "_openmp", lambda: None)
    return team.run


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_runs_once_and_all_at_once(run: Run, threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)
    seen: list[int] = []

    def part(number: int) -> None:
        together.wait()
        seen.append(number)

    run(threads, part)
    assert sorted(seen) == list(range(threads))


def test_what_a_part_raises_comes_out_after_all_have_ended(run: Run) -> None:
    ended = threading.Event()

    def part(number: int) -> None:
        if number == 1:
            raise KeyError("broken")
        ended.set()

    with pytest.raises(KeyError, match="broken"):
        run(2, part)
    assert ended.is_set()
    run(2, no_work)


@pytest.mark.parametrize("openmp", [True, False])
def test_nobody_waits_for_a_part_that_raised(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    counter, threads = np.zeros(1, np.int64), 3
    written, wrong = np.zeros(threads, np.int64), np.zeros(threads, np.int64)

    def part(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        _write_and_look(number, threads, 100, written, counter, wrong)

    with pytest.raises(KeyboardInterrupt):
        team.run(threads, part, counter)


def test_inside_of_another_call_there_are_threads_too(run: Run) -> None:
    seen: list[tuple[int, int]] = []
    run(2, lambda outer: run(2, lambda inner: seen.append((outer, inner))))
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_torch_goes_on_as_before() -> None:
    x = torch.randn(300, 300)
    expected = x @ x
    team.run(3, no_work)
    torch.testing.assert_close(x @ x, expected)


def test_threads_that_meet_see_what_the_others_wrote(run: Run) -> None:
    rounds, threads = 300, 3
    written, counter = np.zeros(threads, np.int64), np.zeros(1, np.int64)
    wrong = np.zeros(threads, np.int64)

    def part(number: int) -> None:
        _write_and_look(number, threads, rounds, written, counter, wrong)

    run(threads, part)
    assert written.tolist() == [rounds] * threads
    assert not wrong.any()


def test_each_number_is_taken_once(run: Run) -> None:
    counter = np.zeros(1, np.int64)
    taken = np.zeros(1000, np.int64)
    run(3, lambda _: _take_all(counter, taken))
    assert taken.tolist() == [1] * 1000


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _write_and_look(number, threads, rounds, written, counter, wrong):  # type: ignore[no-untyped-def]
    for turn in range(1, rounds + 1):
        written[number] = turn
        meet(counter, threads)
        for other in range(threads):
            wrong[number] += written[other] != turn
        meet(counter, threads)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _take_all(counter, taken):  # type: ignore[no-untyped-def]
    number = take(counter)
    while number < taken.shape[0]:
        taken[number] += 1
        number = take(counter)
