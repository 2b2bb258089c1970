"""The scheduler's half: which blocks of a request the store has, and what each step loads and saves.

Owns: the look-ups under way and each request's blocks. Invariant: the engine's loop never waits for the store: a look-up runs on a
thread of its own, the scheduler asks again, and one that is late, failed or not worth it is a miss. Called by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

from attnstore.client.cluster.breaker import CircuitBreaker, CircuitState, had_fair_time
from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError
from attnstore.logs import get_logger
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import page_hashes
from attnstore_worker.vllm.known import KnownPages
from attnstore_worker.vllm.plan import BlockPlan, Costs, LoadPlan, StepPlan

_QUICK_ANSWER_S: Final = 0.002
"""So long a first question waits: on a fast network the answer is there, and the request needs no second turn. After one that was
not answered in time the next do not wait: many requests may come in one step."""
_LOOKUPS_MAX: Final = 4

_log = get_logger(__name__)

Match = Callable[[Sequence[BlockHash]], int]
"""`match(hashes)`: how many of the first pages the store has. Blocks; ends within its deadline or raises an `AttnStoreError`."""


@dataclass(slots=True)
class _Lookup:
    began_ms: float
    found: Future[tuple[int, float]]


@dataclass(slots=True)
class _Request:
    """`block_hashes` is vLLM's own list, which grows with the request."""

    block_hashes: Sequence[bytes]
    hashes: list[BlockHash] = field(default_factory=list)  # our names of its first blocks, as far as they were needed
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    lookup: _Lookup | None = None
    found: int | None = None  # pages, once the look-up is over
    claimed: bool = False  # vLLM has given it blocks: what is to be loaded is decided
    local_blocks: int = 0  # that vLLM had when it asked last
    loads: tuple[BlockPlan, ...] = ()


class SchedulerSide:
    """`lookup_ms_max`: so long a request waits for the store's answer."""

    def __init__(self, match: Match, root: Namespace, layout: PageLayout, clock: Clock, *, lookup_ms_max: float) -> None:
        self._match = match
        self._root = root
        self._layout = layout
        self._clock = clock
        self._lookup_ms_max = lookup_ms_max
        self._gate = Gate(clock)
        self._breaker = CircuitBreaker(clock)
        self._threads = ThreadPoolExecutor(_LOOKUPS_MAX, "attnstore-lookup")
        self._probe: Future[int] | None = None
        self._quick = True
        self._refused = False
        self._late: list[_Lookup] = []
        self._known = KnownPages()
        self._requests: dict[str, _Request] = {}
        self._loads: list[LoadPlan] = []

    def close(self) -> None:
        """Asks nothing any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def hit_tokens(self, request_id: str, block_hashes: Sequence[bytes], prompt_tokens: int, computed_tokens: int) -> int | None:
        """How many tokens after `computed_tokens` (whole blocks) to fetch; None while the store has not answered.

        At most all but the last token: that one must be computed to have logits. Asking claims nothing: vLLM asks again when it had
        no blocks for the request. After `allocated` the answer is 0, also if the load fails, until the request is preempted.
        """
        request = self._requests.setdefault(request_id, _Request(block_hashes))
        block_tokens = self._layout.block_tokens
        local, usable = computed_tokens // block_tokens, (prompt_tokens - 1) // block_tokens
        if request.claimed or usable <= local or not self._store_answers():
            return 0
        if request.found is None:
            request.found = self._look_up(request, usable)
            if request.found is None:
                return None
        blocks = min(request.found, usable) - local
        if blocks <= 0:
            return 0
        if not self._gate.fetch_pays(blocks * block_tokens, blocks * self._layout.page_bytes):
            self._refused = True
            return 0
        request.local_blocks = local
        return blocks * block_tokens

    def allocated(self, request_id: str, block_ids: Sequence[int], external_tokens: int) -> None:
        """vLLM gave a request blocks, those that it had first; the next `external_tokens` are to be loaded."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.claimed = True
        if external_tokens == 0:
            return
        first = request.local_blocks
        last = first + external_tokens // self._layout.block_tokens
        hashes = self._names(request, last)
        request.loads = tuple(BlockPlan(block_ids[index], hashes[index]) for index in range(first, last))
        self._loads.append(LoadPlan(request_id, request.loads))
        request.saved = last

    def failed(self, block_ids: Collection[int]) -> None:
        """These blocks were not loaded: they are computed, and saved then."""
        for request in self._requests.values():
            good = next((index for index, load in enumerate(request.loads) if load.block_id in block_ids), None)
            if good is not None:
                self._known.discard([load.page_hash for load in request.loads[good:]])
                request.saved = request.local_blocks + good
                request.loads = ()

    def scheduled(self, request_id: str, new_block_ids: Sequence[int], *, tokens_after: int, restarted: bool) -> list[BlockPlan]:
        """The blocks of a request that are complete once this step is done and that the store is not known to have.

        `new_block_ids` follow those before, or replace them where the request was `restarted`.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        if restarted:
            request.block_ids.clear()
        request.block_ids += new_block_ids
        last = min(tokens_after // self._layout.block_tokens, len(request.block_hashes), len(request.block_ids))
        if last <= request.saved:
            return []
        hashes = self._names(request, last)
        plans = [
            BlockPlan(request.block_ids[index], hashes[index])
            for index in range(request.saved, last)
            if hashes[index] not in self._known
        ]
        self._known.add([plan.page_hash for plan in plans])
        request.saved = last
        return plans

    def step(self, saves: list[BlockPlan], tokens: int) -> StepPlan:
        """The plan of the step that vLLM is about to run."""
        loads, self._loads = self._loads, []
        return StepPlan(loads, saves, tokens)

    def preempted(self, request_id: str) -> None:
        """A request lost its blocks: when it comes back, the store may be asked again."""
        request = self._requests.get(request_id)
        if request is not None:
            request.lookup, request.found, request.claimed, request.loads = None, None, False, ()

    def finished(self, request_id: str) -> None:
        """A request ended."""
        self._requests.pop(request_id, None)

    def learn(self, costs: Costs) -> None:
        """What the workers measured."""
        self._gate.learn(costs)
        self._refused = self._refused and not costs.loads

    @property
    def wants_probe(self) -> bool:
        """A hit was not claimed, and nothing has told for long how the link is: unmeasured, it would never be used again."""
        return self._refused and self._gate.is_stale

    def _names(self, request: _Request, blocks: int) -> list[BlockHash]:
        """The names of the first blocks; each is computed once, however often it is asked for while the request grows."""
        known = request.hashes
        known += page_hashes(known[-1] if known else self._root, request.block_hashes[len(known) : blocks])
        return known[:blocks]

    def _look_up(self, request: _Request, blocks: int) -> int | None:
        """How many of a request's first `blocks` pages the store has; None while it has not answered."""
        if request.lookup is None:
            request.lookup = _Lookup(self._clock.now_ms(), self._threads.submit(self._timed_match, self._names(request, blocks)))
            if self._quick:
                wait([request.lookup.found], _QUICK_ANSWER_S)
                self._quick = request.lookup.found.done()
        if not request.lookup.found.done() and self._clock.now_ms() - request.lookup.began_ms < self._lookup_ms_max:
            return None
        found = self._outcome(request.lookup)
        request.lookup = None
        names = self._names(request, blocks)
        self._known.add(names[:found])
        self._known.discard(names[found:])
        return found

    def _timed_match(self, hashes: Sequence[BlockHash]) -> tuple[int, float]:
        began_ms = self._clock.now_ms()
        found = self._match(hashes)
        return found, self._clock.now_ms() - began_ms

    def _outcome(self, lookup: _Lookup) -> int:
        """Pages found; 0 for an answer that is late or an error."""
        if not lookup.found.done():
            if had_fair_time(self._clock.now_ms() - lookup.began_ms):
                self._failed("no answer in time")
            else:
                self._late.append(lookup)  # how it ends tells more of the store than this request's hurry
            return 0
        return self._answer(lookup)

    def _answer(self, lookup: _Lookup) -> int:
        """Pages found by a look-up that has ended; 0 for an error."""
        error = lookup.found.exception()
        if error is None:
            found, took_ms = lookup.found.result()
            self._breaker.succeeded()
            self._gate.answered(took_ms)
            self._quick = took_ms < 1e3 * _QUICK_ANSWER_S
            return found
        if not isinstance(error, AttnStoreError):
            raise error
        self._failed(str(error))
        return 0

    def _failed(self, reason: str) -> None:
        self._breaker.failed()
        if self._breaker.state is CircuitState.OPEN:
            _log.warning("the store is left alone until it answers again", reason=reason)
            for request in self._requests.values():
                if request.lookup is not None and request.lookup.found.cancel():  # it waited behind others
                    request.lookup = None

    def _store_answers(self) -> bool:
        """Whether the store is worth asking; while it is not, now and then a question that nobody waits for."""
        for lookup in [lookup for lookup in self._late if lookup.found.done()]:
            self._late.remove(lookup)
            self._answer(lookup)
        if self._breaker.state is CircuitState.OPEN:
            self._probe_store()
        return self._breaker.state is CircuitState.CLOSED

    def _probe_store(self) -> None:
        if self._probe is None and not self._breaker.probe_in_ms():
            self._probe = self._threads.submit(self._match, ())
        if self._probe is not None and self._probe.done():
            failed = self._probe.exception() is not None
            self._probe = None
            if failed:
                self._breaker.probe_failed()
            else:
                self._breaker.succeeded()
