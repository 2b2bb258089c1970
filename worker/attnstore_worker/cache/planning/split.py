"""How much of a prefix to fetch and how much to compute: arithmetic on measured costs, nothing else.

Owns: `split`, which finds where computing from the front and fetching from the back should meet, `search_head`, which says what to
compute while the tiers are still being asked, and the forecasts of the simple choices. Pure: no clock, no state, no I/O.

With k blocks computed and the other m - k of the hits fetched meanwhile, the first token comes after

    ttft(k) = max(slowdown * compute(k), fetch(m - k)) + tail          0 <= k < m
    ttft(m) = compute everything, with no transfer beside it

    layers  = behind * max(fetch(m) + chunk / L, fetch(m) / L + chunk) + tail behind the first chunk

where fetch(j) = ceil(j / batch) * rtt + j * page_bytes / bandwidth. compute grows with k and fetch falls, so the best k is where
they cross: both ends are then busy until they meet (Cake: Jin et al., "Compute or Load KV Cache? Why Not Both?", ICML 2025).
`layers` fetches all hits in one read, layer by layer, L of them, and computes the chunk behind them as they come.

Invariants: (1) a plan that fetches is never predicted slower than computing everything. (2) Idle time is bounded: however the link
behaves, the engine waits with nothing to compute for at most `IDLE_SHARE` of what computing everything takes, and for no block
longer than computing it takes (the rule for renting skis: Karlin et al., 1988). A prompt whose link fails is late by no more.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Final

from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.link import LinkEstimate

IDLE_SHARE: Final = 0.2
"""Waiting that a link may cost, as a share of the time that computing everything takes."""
FETCH_MARGIN: Final = 1.25
"""A fetch must be expected so much before its deadline: some transfers are slower than the median."""
GAIN_MIN: Final = 0.02
"""A plan must be predicted faster than computing by this share; below it the risk is for nothing."""
OVERLAP_GAIN_MIN: Final = 0.1
"""Computing beside a fetch must be worth this share, or the fetch has the machine to itself."""
HEAD_GAIN_MIN: Final = 0.01
"""The same while the tiers are asked, when there is nothing yet that computing could disturb."""
BATCH_RTTS: Final = 8.0
"""A read is so large that its pages take this many round trips, which then cost 1/9 of the bandwidth."""
BATCH_MS_MIN: Final = 10.0
"""A read is at least so long: calls and wake-ups cost some tenths of a millisecond."""


class Choice(enum.StrEnum):
    """What is done about a prompt. LAYERS: fetch, and compute the chunk behind the hits as layers come. MEET: compute from the
    front and fetch from the back at once. PROBE: compute, and fetch a little to measure the link. ATTEND: leave the blocks in the
    store.
    """

    RECOMPUTE = "recompute"
    FETCH = "fetch"
    LAYERS = "layers"
    MEET = "meet"
    PROBE = "probe"
    ATTEND = "attend"


@dataclass(frozen=True, slots=True)
class Costs:
    """What everything costs at one moment. `slowdown` >= 1: how much a running transfer slows computing down; `behind` >= 1: how
    many times as long as its formula says a chunk takes that is computed behind pages which still arrive.
    """

    link: LinkEstimate
    prefill: PrefillCost
    slowdown: float
    behind: float = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of one prompt of `tokens`. Blocks before `front` are computed; those in `[front, asked)` can be fetched or
    computed; those in `[asked, back)` are being read and come in `busy_ms`; the hits behind `back` are there; the rest is computed.

    At first nothing is being read: `asked == back` and `busy_ms == 0`. `hit_end` is where the hits end. A chunk before `front` may
    still be computed, for `ahead_ms`.
    """

    tokens: int
    block_tokens: int
    chunk_tokens: int
    page_bytes: int
    front: int
    asked: int
    back: int
    hit_end: int
    layers: int
    busy_ms: float = 0.0
    ahead_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Compute blocks `[front, meet)`, fetch `[meet, back)` from its end, `batch_blocks` in one read, then compute the tail.

    `tail_ms` begins with `chunk_ms`, the chunk behind the hits, which may run `by_layers` beside the fetch. `patience_ms`: how long
    to wait idle where the fetch is late. `recompute_ms`: everything computed, for comparison.
    """

    work: Work
    meet: int
    batch_blocks: int
    compute_ms: float
    fetch_ms: float
    tail_ms: float
    patience_ms: float
    recompute_ms: float
    chunk_ms: float
    behind: float
    by_layers: bool = False

    @property
    def fetches(self) -> bool:
        """There is something to fetch."""
        return self.meet < self.work.back

    @property
    def ttft_ms(self) -> float:
        """The predicted time until the first token."""
        if not self.fetches:
            return self.recompute_ms
        if self.by_layers:
            share = 1 / self.work.layers
            both_ms = max(self.fetch_ms + self.chunk_ms * share, self.fetch_ms * share + self.chunk_ms)
            return both_ms * self.behind + self.tail_ms - self.chunk_ms
        return max(self.compute_ms, self.fetch_ms) + self.tail_ms

    @property
    def deadline_ms(self) -> float:
        """When to give up what has not arrived."""
        return self.compute_ms + self.patience_ms

    @property
    def choice(self) -> Choice:
        """RECOMPUTE, FETCH, LAYERS or MEET."""
        if not self.fetches:
            return Choice.RECOMPUTE
        if self.by_layers:
            return Choice.LAYERS
        return Choice.FETCH if self.meet == self.work.front else Choice.MEET


def recompute_ms(prefill: PrefillCost, work: Work) -> float:
    """Time to compute everything that is not there."""
    front, back, tail = (block * work.block_tokens for block in (work.front, work.back, work.hit_end))
    if back == tail:
        return work.ahead_ms + prefill.span(front, work.tokens, work.chunk_tokens)
    parts = prefill.span(front, back, work.chunk_tokens) + prefill.span(tail, work.tokens, work.chunk_tokens)
    return work.ahead_ms + parts


def batch_blocks(link: LinkEstimate, page_bytes: int) -> int:
    """Pages in one read, so that round trips cost little and progress is seen often."""
    longest_ms = max(BATCH_RTTS * link.request_ms, BATCH_MS_MIN)
    return max(1, int(longest_ms * link.bytes_per_ms / page_bytes))


def fetch_ms(link: LinkEstimate, page_bytes: int, blocks: int, batch: int) -> float:
    """Time to read so many pages in batches, one after the other."""
    return -(-blocks // batch) * link.request_ms + blocks * page_bytes / link.bytes_per_ms if blocks else 0.0


def patience(prefill: PrefillCost, work: Work) -> float:
    """How long a prompt may wait idle in all, by what is to be done at its admission, in ms."""
    return IDLE_SHARE * recompute_ms(prefill, work)


def split(costs: Costs, work: Work, patience_ms: float) -> Split:
    """The best way to get `work` done with so much patience left."""

    def at(meet: int) -> Split:
        return _at(costs, work, meet, patience_ms)

    def is_computed_last(meet: int) -> bool:
        candidate = at(meet)
        return candidate.compute_ms >= candidate.fetch_ms

    def is_safe(meet: int) -> bool:
        """What is expected comes before patience ends, and so does the first read of a link as slow as this one may well be: after
        it the link is known better, and the split is made anew.
        """
        candidate = at(meet)
        first_ms = costs.link.transfer_ms(candidate.batch_blocks * work.page_bytes)
        first_ms = min(candidate.fetch_ms, max(work.busy_ms, first_ms)) * costs.link.spread
        return max(candidate.fetch_ms * min(costs.link.spread, FETCH_MARGIN), first_ms) <= candidate.deadline_ms

    last = work.asked if work.asked < work.back else work.asked - 1  # what is being read has no other price than waiting for it
    places = range(work.front, last + 1)
    safe, crossing = (bisect_left(places, True, key=test) + work.front for test in (is_safe, is_computed_last))
    candidates = [at(meet) for meet in {work.front, safe, crossing - 1, crossing, last} if meet in places and is_safe(meet)]
    best = min(candidates, key=_with_bias, default=None)
    nothing = at(work.back)
    if best is None or best.ttft_ms >= nothing.ttft_ms * (1 - GAIN_MIN):
        return nothing
    behind = replace(at(work.front), by_layers=True)
    can_be = work.layers > 1 and work.asked == work.back and work.ahead_ms == 0 and is_safe(work.front)
    return behind if can_be and behind.ttft_ms < best.ttft_ms * (1 - OVERLAP_GAIN_MIN) else best


def _with_bias(candidate: Split) -> float:
    return candidate.ttft_ms * (1 if candidate.meet > candidate.work.front else 1 - OVERLAP_GAIN_MIN)


def fetch_is_faster(costs: Costs, work: Work) -> bool:
    """Whether all hits are fetched sooner than they are computed, even if the link is as slow as it may well be: for an engine that
    either fetches a prompt's hits or computes them.
    """
    fetched = fetch_everything(costs, work)
    return fetched.fetch_ms * costs.link.spread + fetched.tail_ms < fetched.recompute_ms


def fetch_everything(costs: Costs, work: Work) -> Split:
    """All hits fetched and nothing computed meanwhile, whatever that costs."""
    return _at(costs, work, work.front, 0.0)


def _at(costs: Costs, work: Work, meet: int, patience_ms: float) -> Split:
    prefill, tokens = costs.prefill, work.block_tokens
    wanted = max(0, work.asked - meet)
    batch = max(1, min(batch_blocks(costs.link, work.page_bytes), wanted))
    tail = work.hit_end * tokens
    chunk_end = min(work.tokens, (tail // work.chunk_tokens + 1) * work.chunk_tokens)
    return Split(
        work=work,
        meet=meet,
        batch_blocks=batch,
        compute_ms=work.ahead_ms + costs.slowdown * prefill.span(work.front * tokens, meet * tokens, work.chunk_tokens),
        fetch_ms=work.busy_ms + fetch_ms(costs.link, work.page_bytes, wanted, batch),
        tail_ms=prefill.span(tail, work.tokens, work.chunk_tokens),
        patience_ms=min(max(patience_ms, 0.0), prefill.span(meet * tokens, work.back * tokens, work.chunk_tokens)),
        recompute_ms=recompute_ms(prefill, work),
        chunk_ms=prefill.chunk(tail, chunk_end),
        behind=costs.behind,
    )


def search_head(costs: Costs, work: Work) -> int:
    """Up to which block to compute while the tiers are asked, supposing that they have everything: `work.front` to compute nothing,
    `work.back` to compute on without regard to the answer.
    """
    rtt_ms = costs.link.rtt_ms
    patience_ms = patience(costs.prefill, work)
    rtt_blocks = bisect_left(range(work.front, work.back), rtt_ms, key=lambda block: _head_ms(costs, work, block))
    heads = [work.front, work.front + rtt_blocks, work.back]
    safe = [head for head in heads if rtt_ms * costs.link.spread <= _head_ms(costs, work, head) + patience_ms]
    bias = {work.front: 1 - HEAD_GAIN_MIN}
    return min(safe, key=lambda head: _after_search_ms(costs, work, head, patience_ms) * bias.get(head, 1), default=work.back)


def _after_search_ms(costs: Costs, work: Work, head: int, patience_ms: float) -> float:
    """The first token where the search is over after one round trip and the engine then looks up from its chunk."""
    chunk_end = (work.front * work.block_tokens // work.chunk_tokens + 1) * work.chunk_tokens // work.block_tokens
    front = min(head, chunk_end, work.back)
    slack_ms = costs.link.rtt_ms - _head_ms(costs, work, front)
    rest = replace(work, front=front, ahead_ms=max(0.0, -slack_ms))
    return costs.link.rtt_ms + split(costs, rest, patience_ms - max(0.0, slack_ms)).ttft_ms


def _head_ms(costs: Costs, work: Work, head: int) -> float:
    return costs.prefill.span(work.front * work.block_tokens, head * work.block_tokens, work.chunk_tokens)
