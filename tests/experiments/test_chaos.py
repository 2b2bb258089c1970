"""The verdict of a chaos run on invented faults and calls: every kind of failure makes the run bad."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from experiments.chaos.caller import rogue_records
from experiments.chaos.faults import RECOVERY_S_MAX, WARM_UP_S, Fault, FaultKind, plan_faults
from experiments.chaos.observation import Call, Healed, Verdict, judge

BEGAN_S = 1_000.0
FAULT = Healed(Fault(FaultKind.KILLED, "store1", 20.0, 4.0), BEGAN_S + 20.0, BEGAN_S + 24.0)
RUN_S = 40.0


def read(at_s: float, hits: int) -> Call:
    return Call("client1", "read", BEGAN_S + at_s, BEGAN_S + at_s + 0.01, 2.0, asked=10, hits=hits)


def reads(back_at_s: float, level: int = 10) -> list[Call]:
    """Ten reads per second, which miss from the fault until `back_at_s`."""
    times = [tenth / 10 for tenth in range(int(RUN_S * 10))]
    return [read(at_s, 2 if 20.0 <= at_s < back_at_s else level) for at_s in times]


def verdict(calls: list[Call]) -> Verdict:
    return judge(7, RUN_S, BEGAN_S, calls, [FAULT])


def test_a_run_that_recovers_in_time_is_good() -> None:
    seen = verdict(reads(back_at_s=26.5))
    assert seen.is_good
    (recovery,) = seen.recoveries
    assert recovery.recovered_s == pytest.approx(2.5, abs=0.2)
    assert (recovery.level, recovery.lowest) == (1.0, 0.2)


def test_a_hit_rate_that_comes_back_too_late_is_not_good() -> None:
    seen = verdict(reads(back_at_s=24.0 + RECOVERY_S_MAX + 1.0))
    assert seen.recoveries[0].recovered_s is None
    assert not seen.is_good


def test_silence_after_a_heal_is_no_recovery() -> None:
    assert not verdict([call for call in reads(26.5) if call.began_s < BEGAN_S + 24.0]).is_good


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"wrong": 1}, "wrong_pages"),
        ({"verb": "complete", "wrong": 1}, "wrong_texts"),
        ({"ended_s": BEGAN_S + 50.0}, "hung"),
        ({"error": "ProtocolError"}, "failed"),
    ],
)
def test_one_bad_call_makes_a_run_bad(change: dict[str, object], count: str) -> None:
    calls = reads(26.5)
    seen = verdict([*calls[:-1], replace(calls[-1], **change)])
    assert getattr(seen, count) == 1
    assert not seen.is_good


def test_an_error_that_means_a_miss_is_counted_and_forgiven() -> None:
    calls = reads(26.5)
    seen = verdict([*calls[:-1], replace(calls[-1], error="Unavailable", is_miss=True)])
    assert seen.errors == {"Unavailable": 1}
    assert seen.is_good


def test_a_run_without_a_fault_proves_nothing() -> None:
    assert not judge(7, RUN_S, BEGAN_S, reads(20.0), []).is_good


CALLER = Healed(Fault(FaultKind.GREEDY, "client", 20.0, 4.0), BEGAN_S + 20.0, BEGAN_S + 24.0)


def test_a_caller_that_nobody_notices_is_good() -> None:
    seen = judge(7, RUN_S, BEGAN_S, reads(20.0), [CALLER])
    assert seen.is_good
    (recovery,) = seen.recoveries
    assert (recovery.during, recovery.recovered_s) == (1.0, 0.0)


def test_a_caller_that_costs_others_their_hits_is_not_good_however_soon_they_come_back() -> None:
    seen = judge(7, RUN_S, BEGAN_S, reads(back_at_s=21.0), [CALLER])
    assert seen.recoveries[0].during == pytest.approx(0.8)
    assert not seen.is_good


def test_callers_leave_records_that_no_node_would_write() -> None:
    records = rogue_records(random.Random(1))
    assert len(records) > 10
    assert records == rogue_records(random.Random(1))


def test_calls_travel_as_lines() -> None:
    call = read(1.0, 3)
    assert Call.from_line(call.to_line()) == call


@pytest.mark.parametrize("seed", range(20))
def test_faults_leave_time_to_measure_and_to_recover(seed: int) -> None:
    faults = plan_faults(seed, 600.0)
    assert faults == plan_faults(seed, 600.0)
    assert faults[0].at_s > WARM_UP_S
    ends = [fault.at_s + fault.for_s + (0.0 if fault.kind.is_caller else RECOVERY_S_MAX) for fault in faults]
    assert all(fault.at_s >= end for fault, end in zip(faults[1:], ends[:-1], strict=True))
    assert ends[-1] <= WARM_UP_S + 600.0
    assert {(fault.kind, fault.service.rstrip("123")) for fault in faults[:10]} == {
        (FaultKind.ROGUE, "client"),
        (FaultKind.HURRIED, "client"),
        (FaultKind.TRICKLING, "client"),
        (FaultKind.GREEDY, "client"),
        (FaultKind.KILLED, "store"),
        (FaultKind.CUT_OFF, "store"),
        (FaultKind.FROZEN, "store"),
        (FaultKind.KILLED, "redis"),
        (FaultKind.CUT_OFF, "redis"),
        (FaultKind.CUT_OFF, "worker"),
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_minute_holds_a_killed_node_a_cut_link_and_a_killed_directory(seed: int) -> None:
    kinds = {(fault.kind, fault.service.rstrip("123")) for fault in plan_faults(seed, 60.0) if not fault.kind.is_caller}
    assert kinds == {(FaultKind.KILLED, "store"), (FaultKind.CUT_OFF, "store"), (FaultKind.KILLED, "redis")}
