"""What is seen during a run, one line of JSON for each call, and what follows from it. Pure.

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
"""A call that ends later than this after its deadline hung."""
_LEVEL_SHARE: Final = 0.9
_WINDOW_S: Final = 1.0
_STEP_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client or one request to a worker.

    `asked` and `hits` count pages of a client's read or a prompt's tokens; `wrong` counts pages or texts that were not what they
    must be. `error` names what was raised, None where nothing was; `is_miss` says that the error is one of those that mean a miss.
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
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Call:
        """Raises `ValueError` or `TypeError` for anything else."""
        return cls(**json.loads(line))

    @property
    def hung(self) -> bool:
        """Whether it outlived its deadline by more than a moment."""
        return self.ended_s - self.began_s > self.deadline_s + HUNG_S


@dataclass(frozen=True, slots=True)
class Recovery:
    """One fault and its end. `during`: the hit rate while it lasted; `lowest`: that of the worst second until it was over.

    `recovered_s`: from the heal until the hit rate was back, None where it was not in time. A caller that misbehaves is recovered
    from at once, or not at all: 0 where the hit rate kept its level meanwhile.
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
    """The whole run. `failed` counts calls that raised what no caller should have to expect."""

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
        """No wrong byte, no wrong token, no hung or failed call, and every fault was recovered from in time."""
        faultless = self.wrong_pages == self.wrong_texts == self.hung == self.failed == 0
        return faultless and bool(self.recoveries) and all(each.recovered_s is not None for each in self.recoveries)


@dataclass(frozen=True, slots=True)
class Healed:
    """When a fault was made and undone, on the monotonic clock. A killed service is healed when its health check passes again."""

    fault: Fault
    began_s: float
    healed_s: float


def judge(seed: int, run_s: float, began_s: float, calls: Sequence[Call], healed: Iterable[Healed]) -> Verdict:
    """What a run showed. `began_s`: when the load began."""
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
    """From the heal to the first second in which the hit rate is back."""
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
