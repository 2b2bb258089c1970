"""How much of a prefix to fetch and how much to compute: arithmetic on measured costs.

Owns: `split`, which finds where computing from the front and fetching from the back should meet, `best_lead` for an engine that
cannot do both at once, `search_head`, which decides what to compute while the tiers are still being asked, and the forecasts of the
simple choices. Pure: no clock, no state, no I/O.

With k blocks computed and the other m - k of the hits fetched meanwhile, the first token comes after

    ttft(k) = max(slowdown * compute(k), fetch(m - k)) + tail          0 <= k < m
    ttft(m) = compute everything, with no transfer at the same time

    layers  = behind * max(fetch(m) + chunk / L, fetch(m) / L + chunk) + tail after the first chunk

where fetch(j) = ceil(j / batch) * rtt + j * page_bytes / bandwidth. compute grows with k and fetch shrinks, so the best k is where
they cross: both are then busy until they meet (Cake: Jin et al., "Compute or Load KV Cache? Why Not Both?", ICML 2025). `layers`
fetches all hits in one read, layer by layer, L of them, and computes the chunk after them as they arrive.

Pages on their way to a device are read in parts, and each part is copied up while the next one is read: a pipeline of two stages,
which is as slow as the slower one. Each batch then takes one part of the faster stage more: the last copy, or the first read.

    fetch(j) = max(read(j), copy(j)) + ceil(j / batch) * min(read(part), copy(part))

A read by layers is one batch, whose parts are the layers. Copies of layers are many small ones, and have a speed of their own.

Invariants: (1) a plan that fetches is never predicted slower than computing everything. (2) Idle time is bounded: however the link
behaves, the engine waits with nothing to compute for at most `IDLE_SHARE` of the time of computing everything, and for no block
longer than computing it takes (the ski rental rule: Karlin et al., 1988). A prompt whose link fails is delayed by no more.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Final

from attnstore_worker.cache.moving.staging import part_pages
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.link import LinkEstimate

IDLE_SHARE: Final = 0.2
"""Maximum idle waiting for a link, as a share of the time of computing everything."""
FETCH_MARGIN: Final = 1.25
"""A fetch must be expected this much before its deadline, because some transfers are slower than the median."""
GAIN_MIN: Final = 0.02
"""A plan must be predicted faster than computing by this share to be worth the risk."""
OVERLAP_GAIN_MIN: Final = 0.1
"""Computing during a fetch must gain this share, otherwise the fetch has the machine to itself."""
HEAD_GAIN_MIN: Final = 0.01
"""The same while the tiers are asked, when computing cannot disturb a fetch yet."""
BATCH_RTTS: Final = 8.0
"""The pages of a read take at least this many round trips, so that a round trip costs at most 1/9 of the bandwidth."""
BATCH_MS_MIN: Final = 10.0
"""The minimum duration of a read, because calls and wake-ups cost some tenths of a millisecond."""


class Choice(enum.StrEnum):
    """The decision about a prompt. LAYERS: fetch, and compute the chunk after the hits as layers arrive. MEET: compute from the
    front and fetch from the back at the same time. PROBE: compute, and fetch a little to measure the link. ATTEND: leave the blocks
    in the store.
    """

    RECOMPUTE = "recompute"
    FETCH = "fetch"
    LAYERS = "layers"
    MEET = "meet"
    PROBE = "probe"
    ATTEND = "attend"


@dataclass(frozen=True, slots=True)
class Costs:
    """All costs at one moment. `slowdown` >= 1: how much a running transfer slows computing down; `behind` >= 1: how many times
    longer than its formula a chunk takes that is computed after pages still arriving. `copy` is that of pages from staging to a
    device, `layer_copy` that of layers of pages; None if they are read into their blocks, or if it is unknown.
    """

    link: LinkEstimate
    prefill: PrefillCost
    slowdown: float
    behind: float = 1.0
    copy: LinkEstimate | None = None
    layer_copy: LinkEstimate | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """The remaining work of one prompt of `tokens`. Blocks before `front` are computed; those in `[front, asked)` can be fetched or
    computed; those in `[asked, back)` are being read and arrive in `busy_ms`; the hits after `back` have arrived; the rest is
    computed.

    At first nothing is being read: `asked == back` and `busy_ms == 0`. `hit_end` is the end of the hits. Blocks before `front` may
    still be computed, or be copied up from HOST, for `ahead_ms`.
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
    """Compute blocks `[front, meet)`, fetch `[meet, back)` from its end, `batch_blocks` per read, then compute the tail.

    `tail_ms` begins with `chunk_ms`, the chunk after the hits, which may run `by_layers` during the fetch. `idle_budget_ms`: how
    long to wait idle if the fetch is late. `recompute_ms`: everything computed, for comparison.
    """

    work: Work
    meet: int
    batch_blocks: int
    compute_ms: float
    fetch_ms: float
    tail_ms: float
    idle_budget_ms: float
    recompute_ms: float
    chunk_ms: float
    behind: float
    by_layers: bool = False

    @property
    def fetches(self) -> bool:
        """True if there is something to fetch."""
        return self.meet < self.work.back

    @property
    def ttft_ms(self) -> float:
        """The predicted time to the first token."""
        if not self.fetches:
            return self.recompute_ms
        if self.by_layers:
            share = 1 / self.work.layers
            both_ms = max(self.fetch_ms + self.chunk_ms * share, self.fetch_ms * share + self.chunk_ms)
            return both_ms * self.behind + self.tail_ms - self.chunk_ms
        return max(self.compute_ms, self.fetch_ms) + self.tail_ms

    def slow_ms(self, link: LinkEstimate) -> float:
        """Returns the time to the first token if `link` is as slow as it may well be, with nothing computed during the fetch."""
        return self.fetch_ms * link.spread + self.tail_ms

    @property
    def deadline_ms(self) -> float:
        """When to give up pages that have not arrived."""
        return self.compute_ms + self.idle_budget_ms

    @property
    def choice(self) -> Choice:
        """RECOMPUTE, FETCH, LAYERS or MEET."""
        if not self.fetches:
            return Choice.RECOMPUTE
        if self.by_layers:
            return Choice.LAYERS
        return Choice.FETCH if self.meet == self.work.front else Choice.MEET


def recompute_ms(prefill: PrefillCost, work: Work) -> float:
    """Returns the time to compute everything that is not there."""
    front, back, tail = (block * work.block_tokens for block in (work.front, work.back, work.hit_end))
    if back == tail:
        return work.ahead_ms + prefill.span(front, work.tokens, work.chunk_tokens)
    parts = prefill.span(front, back, work.chunk_tokens) + prefill.span(tail, work.tokens, work.chunk_tokens)
    return work.ahead_ms + parts


def batch_blocks(link: LinkEstimate, page_bytes: int, copy: LinkEstimate | None = None) -> int:
    """Returns the pages per batch: enough that its round trip, and the part that is read or copied alone, cost little; few enough
    that progress is visible.
    """
    alone_ms, bytes_per_ms = link.request_ms, link.bytes_per_ms
    if copy is not None:
        alone_ms += _alone_ms(link, copy, page_bytes, part_pages(page_bytes))
        bytes_per_ms = min(bytes_per_ms, copy.bytes_per_ms)
    return max(1, int(max(BATCH_RTTS * alone_ms, BATCH_MS_MIN) * bytes_per_ms / page_bytes))


def fetch_ms(link: LinkEstimate, page_bytes: int, blocks: int, batch: int, copy: LinkEstimate | None = None) -> float:
    """Returns the time to read that many pages in batches, one after the other, and to `copy` them to a device part by part."""
    if not blocks:
        return 0.0
    batches = -(-blocks // batch)
    if copy is None:
        return batches * link.request_ms + blocks * page_bytes / link.bytes_per_ms
    part = min(batch, blocks, part_pages(page_bytes))
    parts = blocks // batch * -(-batch // part) + -(-(blocks % batch) // part)
    read_ms, copy_ms = (parts * stage.request_ms + blocks * page_bytes / stage.bytes_per_ms for stage in (link, copy))
    return max(read_ms, copy_ms) + batches * _alone_ms(link, copy, page_bytes, part)


def _alone_ms(link: LinkEstimate, copy: LinkEstimate, page_bytes: int, part: int) -> float:
    """Returns how long one stage works on a part while the other one has nothing to do."""
    return min(link.transfer_ms(part * page_bytes), copy.transfer_ms(part * page_bytes))


def idle_budget(prefill: PrefillCost, work: Work) -> float:
    """Returns how long, in ms, a prompt may wait idle in total, by its work at admission."""
    return IDLE_SHARE * recompute_ms(prefill, work)


def split(costs: Costs, work: Work, idle_budget_ms: float) -> Split:
    """Returns the best split of `work` with that much of the idle budget left."""

    def at(meet: int) -> Split:
        return _at(costs, work, meet, idle_budget_ms)

    def is_computed_last(meet: int) -> bool:
        candidate = at(meet)
        return candidate.compute_ms >= candidate.fetch_ms

    def is_safe(meet: int) -> bool:
        """Returns whether the fetch is expected within the idle budget, and also the first read on a link as slow as this one may
        be: after that read the link is known better, and the split is computed again.
        """
        candidate = at(meet)
        first_ms = fetch_ms(costs.link, work.page_bytes, candidate.batch_blocks, candidate.batch_blocks, costs.copy)
        first_ms = min(candidate.fetch_ms, max(work.busy_ms, first_ms)) * costs.link.spread
        return max(candidate.fetch_ms * min(costs.link.spread, FETCH_MARGIN), first_ms) <= candidate.deadline_ms

    last = work.asked if work.asked < work.back else work.asked - 1  # pages being read cost only the waiting for them
    places = range(work.front, last + 1)
    safe, crossing = (bisect_left(places, True, key=test) + work.front for test in (is_safe, is_computed_last))
    candidates = [at(meet) for meet in {work.front, safe, crossing - 1, crossing, last} if meet in places and is_safe(meet)]
    best = min(candidates, key=_with_bias, default=None)
    nothing = at(work.back)
    if best is None or best.ttft_ms >= nothing.ttft_ms * (1 - GAIN_MIN):
        return nothing
    behind = replace(at(work.front), by_layers=True, fetch_ms=_layers_ms(costs, work))
    can_be = work.layers > 1 and work.asked == work.back and work.ahead_ms == 0 and is_safe(work.front)
    return behind if can_be and behind.ttft_ms < best.ttft_ms * (1 - OVERLAP_GAIN_MIN) else best


def _layers_ms(costs: Costs, work: Work) -> float:
    """Returns the time to read all hits layer by layer, and to copy each layer to a device."""
    blocks = work.asked - work.front
    read_ms = fetch_ms(costs.link, work.page_bytes, blocks, batch_blocks(costs.link, work.page_bytes))
    copy = costs.layer_copy or costs.copy
    if copy is None:
        return read_ms
    copy_ms = work.layers * copy.request_ms + blocks * work.page_bytes / copy.bytes_per_ms
    return max(read_ms, copy_ms) + min(read_ms, copy_ms) / work.layers


def _with_bias(candidate: Split) -> float:
    return candidate.ttft_ms * (1 if candidate.meet > candidate.work.front else 1 - OVERLAP_GAIN_MIN)


def best_lead(costs: Costs, work: Work, fetch_ms_max: float) -> Split:
    """Returns the split that fetches the best leading part of the hits, up to its `work.hit_end`, and then computes the rest; it
    fetches nothing if that is best. For an engine that fetches first and computes afterwards.

    Best is the soonest first token if the link is as slow as it may well be. Fetches that are expected to take longer than
    `fetch_ms_max` are left out. Between two chunk ends, and over all chunk ends, the time is concave in the length of the part: a
    page always takes as long to fetch, and a later block takes longer to compute. So the best part ends at the first or last chunk
    end, or with the hits.
    """
    chunk_tokens, page_bytes = work.chunk_tokens, work.page_bytes
    batch = batch_blocks(costs.link, page_bytes, costs.copy)
    possible = range(work.front, work.hit_end + 1)
    last = bisect_right(
        possible, fetch_ms_max, key=lambda end: fetch_ms(costs.link, page_bytes, end - work.front, batch, costs.copy)
    )
    possible = possible[:last]
    first_chunk, last_chunk = work.front * work.block_tokens // chunk_tokens + 1, possible[-1] * work.block_tokens // chunk_tokens
    ends = {possible[-1], *(-(-chunk * chunk_tokens // work.block_tokens) for chunk in (first_chunk, last_chunk))}
    leads = [fetch_everything(costs, replace(work, asked=end, back=end, hit_end=end)) for end in sorted(ends) if end in possible]
    nothing = fetch_everything(costs, replace(work, asked=work.front, back=work.front, hit_end=work.front))
    best = min(leads, key=lambda lead: lead.slow_ms(costs.link))
    return best if best.slow_ms(costs.link) < nothing.recompute_ms else nothing


def fetch_everything(costs: Costs, work: Work) -> Split:
    """Returns the split that fetches all hits and computes nothing meanwhile, whatever it costs."""
    return _at(costs, work, work.front, 0.0)


def _at(costs: Costs, work: Work, meet: int, idle_budget_ms: float) -> Split:
    prefill, tokens = costs.prefill, work.block_tokens
    wanted = max(0, work.asked - meet)
    batch = max(1, min(batch_blocks(costs.link, work.page_bytes, costs.copy), wanted))
    tail = work.hit_end * tokens
    chunk_end = min(work.tokens, (tail // work.chunk_tokens + 1) * work.chunk_tokens)
    return Split(
        work=work,
        meet=meet,
        batch_blocks=batch,
        compute_ms=work.ahead_ms + costs.slowdown * prefill.span(work.front * tokens, meet * tokens, work.chunk_tokens),
        fetch_ms=work.busy_ms + fetch_ms(costs.link, work.page_bytes, wanted, batch, costs.copy),
        tail_ms=prefill.span(tail, work.tokens, work.chunk_tokens),
        idle_budget_ms=min(max(idle_budget_ms, 0.0), prefill.span(meet * tokens, work.back * tokens, work.chunk_tokens)),
        recompute_ms=recompute_ms(prefill, work),
        chunk_ms=prefill.chunk(tail, chunk_end),
        behind=costs.behind,
    )


def search_head(costs: Costs, work: Work) -> int:
    """Returns the block up to which to compute while the tiers are asked, assuming that they have everything: `work.front` to
    compute nothing, `work.back` to compute regardless of the answer.
    """
    rtt_ms = costs.link.rtt_ms
    idle_budget_ms = idle_budget(costs.prefill, work)
    rtt_blocks = bisect_left(range(work.front, work.back), rtt_ms, key=lambda block: _head_ms(costs, work, block))
    heads = [work.front, work.front + rtt_blocks, work.back]
    safe = [head for head in heads if rtt_ms * costs.link.spread <= _head_ms(costs, work, head) + idle_budget_ms]
    bias = {work.front: 1 - HEAD_GAIN_MIN}
    return min(safe, key=lambda head: _after_search_ms(costs, work, head, idle_budget_ms) * bias.get(head, 1), default=work.back)


def _after_search_ms(costs: Costs, work: Work, head: int, idle_budget_ms: float) -> float:
    """Returns the time to the first token if the search takes one round trip and the engine then finishes its chunk."""
    chunk_end = (work.front * work.block_tokens // work.chunk_tokens + 1) * work.chunk_tokens // work.block_tokens
    front = min(head, chunk_end, work.back)
    slack_ms = costs.link.rtt_ms - _head_ms(costs, work, front) - work.ahead_ms
    rest = replace(work, front=front, ahead_ms=max(0.0, -slack_ms))
    return costs.link.rtt_ms + split(costs, rest, idle_budget_ms - max(0.0, slack_ms)).ttft_ms


def _head_ms(costs: Costs, work: Work, head: int) -> float:
    return costs.prefill.span(work.front * work.block_tokens, head * work.block_tokens, work.chunk_tokens)
