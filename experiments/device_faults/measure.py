"""Runs scenarios on the simulated device, with each wait left out in turn.

Owns: `Report`. Invariants: with all waits in place no access races and every byte and token is right; a wait counts as noticed only
if both schedules notice it, because a race does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, get_args

from attnstore_worker.device.base import Wait
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from experiments.device_faults import caches, connector, engines, nodes

Scenario = Callable[[SimulatedDevice], None]

SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)
NOTICED_BY: Final[Mapping[Wait, Scenario]] = {
    **caches.SCENARIOS,
    **nodes.SCENARIOS,
    **connector.SCENARIOS,
    Wait.TABLES_AFTER_STEP: engines.prefills_in_chunks,
    Wait.TOKENS_AFTER_COMPUTE: engines.loads_from_the_store,
    Wait.QUERY_AFTER_COMPUTE: engines.partials_are_exchanged,
    Wait.PARTIAL_AFTER_MERGE: engines.partials_are_exchanged,
}
"""The shortest scenario that needs the wait."""
_TRANSFERS: Final[tuple[Scenario, ...]] = (
    *dict.fromkeys(caches.SCENARIOS.values()),
    *nodes.SCENARIOS.values(),
    *dict.fromkeys(connector.SCENARIOS.values()),
    connector.loads_into_recycled_blocks,
)
_ALL: Final[tuple[Scenario, ...]] = (*_TRANSFERS, *engines.SCENARIOS)
_BRIEF: Final[tuple[Scenario, ...]] = (*_TRANSFERS, engines.loads_by_layers, engines.partials_are_exchanged)


@dataclass(frozen=True, slots=True)
class Notice:
    """How a scenario noticed that a wait was left out: `unsynchronised`, or the error that it ended with."""

    wait: str
    schedule: str
    scenario: str
    how: str


@dataclass(slots=True)
class Report:
    """waits: all names. caught: those that were noticed with both schedules. suites: scenarios that ran with all waits in place.
    unsynchronised: races that were found then. failed: scenarios that failed then, with the error.
    """

    waits: list[str] = field(default_factory=list)
    caught: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    unsynchronised: int = 0
    failed: list[str] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every wait was noticed, and nothing failed with all of them in place."""
        return self.waits == self.caught and not self.unsynchronised and not self.failed


def measure(*, quick: bool, said: Callable[[str], None] = print) -> Report:
    """Runs everything; `said` is told of each result. `quick` leaves out most engines, and scenarios for waits of others."""
    report = Report(waits=[wait.name for wait in Wait], schedules=list(SCHEDULES))
    scenarios = _BRIEF if quick else _ALL
    report.suites = [_name(scenario) for scenario in scenarios]
    for schedule in SCHEDULES:
        for scenario in scenarios:
            races, error = _run(scenario, SimulatedDevice(schedule, uses_triton=True))
            report.unsynchronised += races
            if error is not None:
                report.failed.append(f"{_name(scenario)}, {schedule}: {error}")
            said(f"all waits, {schedule}: {_name(scenario)}: {error or 'right'}")
    for wait in Wait:
        own = [NOTICED_BY[wait]] if wait in NOTICED_BY else []
        tried = own if quick else [*own, *(scenario for scenario in scenarios if scenario not in own)]
        noticed = {schedule: _notices(report, wait, schedule, tried) for schedule in SCHEDULES}
        if all(noticed.values()):
            report.caught.append(wait.name)
        said(f"without {wait.name}: noticed by {noticed}")
    return report


def _notices(report: Report, wait: Wait, schedule: Schedule, scenarios: list[Scenario]) -> int:
    count = 0
    for scenario in scenarios:
        races, error = _run(scenario, SimulatedDevice(schedule, without=wait, uses_triton=True))
        if races or error is not None:
            report.notices.append(Notice(wait.name, schedule, _name(scenario), "unsynchronised" if races else str(error)))
            count += 1
    return count


def _run(scenario: Scenario, device: SimulatedDevice) -> tuple[int, str | None]:
    """Returns the races that were found, and the error that the scenario ended with."""
    error = None
    try:
        scenario(device)
    except Exception as raised:  # whatever the parts of a worker make of a race or of wrong bytes
        error = f"{type(raised).__name__}: {raised}".partition("\n")[0]
    return len(device.races.found), error


def _name(scenario: Scenario) -> str:
    return f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"
