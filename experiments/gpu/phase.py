"""One phase of a run: `python -m experiments.gpu.phase NAME --out DIR --device DEVICE [--quick]`.

Owns: `Phase`, what every phase is given, and the choice of a phase by name. Invariant: a phase that raises has recorded why.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attnstore.command_line import CommandParser
from attnstore_worker.device.base import Device, Event, Wait
from attnstore_worker.device.factory import open_device
from experiments.gpu.results import Figure, Rows, Target, ceiling

_WARM_UPS: Final = 2
_REPEATS: Final = 7


@dataclass(frozen=True, slots=True)
class Phase:
    """What a phase measures on, and where it records. `quick`: sizes that a CPU computes in seconds. `timings` is False on a
    simulated device, whose times say nothing: `time_ms` runs the work once then.
    """

    device: Device
    rows: Rows
    folder: Path
    quick: bool
    timings: bool

    def time_ms(self, work: Callable[[], object], *, repeats: int = _REPEATS) -> float | None:
        """Returns the median duration of `work` on the device in milliseconds; None without timings."""
        if not self.timings:
            work()
            return None
        for _ in range(_WARM_UPS):
            work()
        timers = []
        for _ in range(repeats):
            timer = self.device.timer()
            work()
            timer.stop()
            timers.append(timer)
        self.synchronize()
        times = sorted(ms for timer in timers if (ms := timer.elapsed_ms()) is not None)
        return times[len(times) // 2]

    def copy_ms(self, submit: Callable[[], Sequence[Event]], *, repeats: int = _REPEATS) -> float | None:
        """Returns the median time from the submission of copies to their last event in milliseconds; None without timings."""
        times = []
        for _ in range(_WARM_UPS + repeats if self.timings else 1):
            begin = time.perf_counter()
            _wait(submit())
            times.append((time.perf_counter() - begin) * 1e3)
        times = sorted(times[_WARM_UPS:])
        return times[len(times) // 2] if self.timings else None

    def synchronize(self) -> None:
        """Waits for all work on the compute stream."""
        _wait([self.device.compute.record()])

    def rate(
        self,
        name: str,
        amount: float,
        unit: str,
        took_ms: float | None,
        *,
        against: str | None = None,
        target: Target | None = None,
    ) -> None:
        """Records `amount` (in 1e9 of the unit's numerator) per second, and its ratio to a ceiling of this run."""
        if took_ms is not None:
            value = amount / took_ms * 1e3
            limit = ceiling(self.folder, against) if against is not None else None
            self.rows.figure(Figure(name, value, unit, against, value / limit if limit else None, target))

    def compare(self, name: str, value: float, unit: str, against: str, ratio: float, target: Target | None = None) -> None:
        """Records a value whose ratio to something else of this phase is known."""
        self.rows.figure(Figure(name, value, unit, against, ratio, target))


def _wait(events: Sequence[Event]) -> None:
    for event in events:
        event.wait(Wait.TOKENS_AFTER_COMPUTE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a phase. Returns the number of wrong checks, at most 100; 101 if the phase raised."""
    parser = CommandParser(prog="python -m experiments.gpu.phase")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    rows = Rows(arguments.out, arguments.name)
    module = importlib.import_module(f"experiments.gpu.phases.{arguments.name}")
    try:
        device = open_device(arguments.device)
        timings = device.torch_device.type != "cpu"
        module.run(Phase(device, rows, arguments.out, arguments.quick, timings))
    except Exception as error:
        traceback.print_exc()
        rows.check("the phase ran to its end", ok=False, detail=f"{type(error).__name__}: {error}")
        return 101
    return min(rows.failed, 100)


if __name__ == "__main__":
    raise SystemExit(main())
