"""The observations of a run, one line of JSON per call, and the verdict derived from them. Pure.

Times are seconds of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from experiments.chaos.faults import LEVEL_S, RECOVERY_S_MAX, WARM_UP_S, Fault

HUNG_S: Final = 1.0
"""A call hung if it ends later than this after its deadline."""
_LEVEL_SHARE: Final = 0.9
_WINDOW_S: Final = 1.0
_STEP_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client or one request to a worker.

    `asked` and `hits` count pages of a client's read or a prompt's tokens; `wrong` counts pages or texts with wrong content.
    `error` names the raised error, or is None; `is_miss` means that the error counts as a miss.
    """

    who: str
    verb: str
    began_s: float
    ended_s: float
    deadline_s: float
    asked: int = 0
    hits: int = 0
    wrong: int = 0
    error: str | None = None
    is_miss: bool = False

    def to_line(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Call:
        """The inverse of `to_line`. Raises `ValueError` or `TypeError` for other text."""
        return cls(**json.loads(line))

    @property
    def hung(self) -> bool:
        """True if it ended later than `HUNG_S` after its deadline."""
        return self.ended_s - self.began_s > self.deadline_s + HUNG_S


@dataclass(frozen=True, slots=True)
class Recovery:
    """One fault and the recovery from it. `during` is the hit rate while it lasted, `lowest` that of the worst second until the
    recovery.

    `recovered_s` is the time from the end of the fault until the hit rate was back, or None if it was not in time. For a
    misbehaving caller it is 0 if the hit rate kept its level, else None.
    """

    kind: str
    service: str
    began_s: float
    healed_s: float
    level: float
    during: float
    lowest: float
    recovered_s: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the whole run. `failed` counts calls with an error that no caller should have to expect."""

    seed: int
    run_s: float
    calls: dict[str, int]
    wrong_pages: int
    wrong_texts: int
    hung: int
    failed: int
    errors: dict[str, int]
    slowest_s: dict[str, float]
    hit_rate: float
    worker_hit_rate: float
    recovery_s_max: float
    recoveries: list[Recovery]

    @property
    def is_good(self) -> bool:
        """True if there was no wrong byte or token, no hung or failed call, and every recovery was in time."""
        faultless = self.wrong_pages == self.wrong_texts == self.hung == self.failed == 0
        return faultless and bool(self.recoveries) and all(each.recovered_s is not None for each in self.recoveries)


@dataclass(frozen=True, slots=True)
class Healed:
    """When a fault began and ended, on the monotonic clock. A killed service has recovered when its health check passes again."""

    fault: Fault
    began_s: float
    healed_s: float


def judge(seed: int, run_s: float, began_s: float, calls: Sequence[Call], healed: Iterable[Healed]) -> Verdict:
    """Judges a run. `began_s` is the start of the load."""
    reads = [call for call in calls if call.verb == "read"]
    texts = [call for call in calls if call.verb == "complete"]
    warm = [call for call in reads if call.began_s >= began_s + WARM_UP_S]
    return Verdict(
        seed=seed,
        run_s=run_s,
        calls=dict(Counter(call.verb for call in calls)),
        wrong_pages=sum(call.wrong for call in reads),
        wrong_texts=sum(call.wrong for call in texts),
        hung=sum(call.hung for call in calls),
        failed=sum(call.error is not None and not call.is_miss for call in calls),
        errors=dict(Counter(call.error for call in calls if call.error is not None)),
        slowest_s={verb: round(_slowest(calls, verb), 3) for verb in sorted({call.verb for call in calls})},
        hit_rate=round(_hit_rate(warm), 4),
        worker_hit_rate=round(_hit_rate(texts), 4),
        recovery_s_max=RECOVERY_S_MAX,
        recoveries=[_recovery(each, reads, began_s) for each in healed],
    )


def _recovery(healed: Healed, reads: Sequence[Call], began_s: float) -> Recovery:
    kind = healed.fault.kind
    level = _hit_rate(_within(reads, healed.began_s - LEVEL_S, healed.began_s))
    during = _hit_rate(_within(reads, healed.began_s, healed.healed_s))
    if kind.is_caller:
        end_s = healed.healed_s
        recovered_s = 0.0 if during >= _LEVEL_SHARE * level else None
    else:
        end_s = healed.healed_s + RECOVERY_S_MAX
        recovered_s = _recovered_s(healed.healed_s, reads, level)
    seconds = range(int(healed.began_s), int(end_s))
    rates = [_hit_rate(seen) for second in seconds if (seen := _within(reads, second, second + 1))]
    return Recovery(
        kind=kind.value,
        service=healed.fault.service,
        began_s=round(healed.began_s - began_s, 2),
        healed_s=round(healed.healed_s - began_s, 2),
        level=round(level, 4),
        during=round(during, 4),
        lowest=round(min(rates, default=0.0), 4),
        recovered_s=round(recovered_s, 2) if recovered_s is not None else None,
    )


def _recovered_s(healed_s: float, reads: Sequence[Call], level: float) -> float | None:
    """Returns the time from the end of the fault to the first second in which the hit rate is back."""
    for step in range(int((RECOVERY_S_MAX - _WINDOW_S) / _STEP_S) + 1):
        start_s = healed_s + step * _STEP_S
        seen = _within(reads, start_s, start_s + _WINDOW_S)
        if seen and _hit_rate(seen) >= _LEVEL_SHARE * level:
            return start_s - healed_s
    return None


def _within(calls: Sequence[Call], begin_s: float, end_s: float) -> list[Call]:
    return [call for call in calls if begin_s <= call.began_s < end_s]


def _hit_rate(calls: Sequence[Call]) -> float:
    asked = sum(call.asked for call in calls)
    return sum(call.hits for call in calls) / asked if asked else 0.0


def _slowest(calls: Sequence[Call], verb: str) -> float:
    return max(call.ended_s - call.began_s for call in calls if call.verb == verb)
