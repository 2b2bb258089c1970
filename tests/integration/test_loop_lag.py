"""No request, however large, keeps a node's event loop from its other callers for longer than 50 ms, nor the store's lock."""

from __future__ import annotations

import pytest

from experiments.loop_lag.calls import CALLS
from experiments.loop_lag.measure import Lag, best, measure

LAG_MS_MAX = 50.0
TRIES = 3


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_rpc_at_its_largest_size_holds_up_the_event_loop_or_the_lock() -> None:
    # Processor time, because others may have the cores; the best of several tries of those that seem too slow.
    slow = list(CALLS)
    rows: dict[tuple[str, str], Lag] = {}
    for _ in range(TRIES):
        for row in measure(attend_threads=1, tries=1, calls=tuple(slow)):
            key = (row.rpc, row.size)
            rows[key] = best([row, rows[key]]) if key in rows else row
        slow = [call for call in CALLS if max(rows[call.rpc, call.size].busy_ms, rows[call.rpc, call.size].lock_ms) > LAG_MS_MAX]
        if not slow:
            return
    assert not slow, "\n".join(f"{rows[call.rpc, call.size]}" for call in slow)
