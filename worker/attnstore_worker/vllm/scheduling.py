"""The scheduler's half: which blocks of a request the store has, and what each step loads and saves.

Owns: each request's look-up and blocks. Invariant: the engine's loop never waits for the store: the scheduler asks again until a
look-up has its answer, and a late or failed look-up is a miss. While the store fails, it is asked on behalf of no request. Called
by one thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.planning.split import Work
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import page_hashes
from attnstore_worker.vllm.known import KnownPages
from attnstore_worker.vllm.lookups import Lookup, Lookups
from attnstore_worker.vllm.plan import BlockPlan, Blocks, RequestLoad, StepPlan
from attnstore_worker.vllm.store_events import Chain, StoreEvents


@dataclass(slots=True)
class _Request:
    """`block_hashes` is vLLM's own list, which grows with the request."""

    block_hashes: Sequence[bytes]
    hashes: list[BlockHash] = field(default_factory=list)  # our names of its first blocks; grows when more are needed
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    lookup: Lookup | None = None
    found: int | None = None  # pages, once the look-up is over
    claimed: bool = False  # vLLM has given it blocks, so its load is decided
    local_blocks: int = 0  # those that vLLM had when it asked last
    loads: Sequence[BlockPlan] = ()
    chain: Chain | None = None  # if there are events


class SchedulerSide:
    """Looks up pages in `tier`, and claims the part of a hit that `gate` chooses. vLLM computes at most `chunk_tokens` in a step; a
    request waits at most `lookup_ms_max` for the store's answer. `events` is told of what the store has.
    """

    def __init__(
        self,
        tier: RemoteTier,
        gate: Gate,
        root: Namespace,
        layout: PageLayout,
        clock: Clock,
        *,
        lookup_ms_max: float,
        chunk_tokens: int,
        events: StoreEvents | None = None,
    ) -> None:
        self._tier = tier
        self._gate = gate
        self._root = root
        self._layout = layout
        self._clock = clock
        self._lookup_ms_max = lookup_ms_max
        self._chunk_tokens = chunk_tokens
        self._events = events
        self._lookups = Lookups(tier, root)
        self._probe: Lookup | None = None
        self._refused = False
        self._known = KnownPages()
        self._requests: dict[str, _Request] = {}
        self._loads: list[RequestLoad] = []

    def close(self) -> None:
        """Ends the look-ups, without waiting for them."""
        self._lookups.close()

    def arrived(self, request_id: str, block_hashes: Sequence[bytes], prompt_tokens: int, chain: Chain | None = None) -> None:
        """A request waits for its turn. Its look-up starts now, so that the answer is there when it is scheduled. `chain`: what
        events say of it.
        """
        request = self._requests.setdefault(request_id, _Request(block_hashes))
        request.chain = chain
        if request.lookup is None and self._store_answers():
            self._start_lookup(request, self._usable_blocks(prompt_tokens))

    def hit_tokens(self, request_id: str, block_hashes: Sequence[bytes], prompt_tokens: int, computed_tokens: int) -> int | None:
        """Returns how many tokens after `computed_tokens` (whole blocks) to fetch; None while the store has not answered. These are
        the leading part of what the store has that `Gate` chooses.

        The last token is never fetched, because it must be computed to have logits. A look-up claims nothing: vLLM asks again if it
        had no blocks for the request. After `allocated` the answer is 0, even if the load fails, until the request is preempted.
        """
        request = self._requests.setdefault(request_id, _Request(block_hashes))
        block_tokens = self._layout.block_tokens
        local, usable = computed_tokens // block_tokens, self._usable_blocks(prompt_tokens)
        if request.claimed or usable <= local or not self._store_answers():
            return 0
        if request.found is None:
            request.found = self._look_up(request, usable)
            if request.found is None:
                return None
        hits = min(request.found, usable)
        if hits <= local:
            return 0
        blocks = self._gate.blocks_to_fetch(self._work(prompt_tokens, local, hits))
        self._refused |= blocks == 0
        request.local_blocks = local
        return blocks * block_tokens

    def allocated(self, request_id: str, block_ids: Sequence[int], external_tokens: int) -> None:
        """Records the blocks that vLLM gave a request: those it had come first, then those of the `external_tokens`
        to be loaded.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        request.claimed = True
        if external_tokens == 0:
            return
        first = request.local_blocks
        last = first + external_tokens // self._layout.block_tokens
        hashes = self._names(request, last)
        request.loads = Blocks(block_ids[first:last], hashes[first:last])
        self._loads.append(RequestLoad(request_id, request.loads))
        request.saved = last

    def failed(self, block_ids: Collection[int]) -> None:
        """Records blocks that were not loaded: vLLM computes them, and they are saved then."""
        for request in self._requests.values():
            good = next((index for index, load in enumerate(request.loads) if load.block_id in block_ids), None)
            if good is not None:
                self._known.discard([load.page_hash for load in request.loads[good:]])
                request.saved = request.local_blocks + good
                request.loads = ()

    def scheduled(self, request_id: str, new_block_ids: Sequence[int], *, tokens_after: int, restarted: bool) -> list[BlockPlan]:
        """Returns the blocks of a request that are complete after this step and that the store is not known to have.

        `new_block_ids` are added to those of earlier steps, or replace them if the request was `restarted`.
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
        if self._events is not None and request.chain is not None and plans:
            new = {plan.page_hash for plan in plans}
            blocks = [(index, hashes[index]) for index in range(request.saved, last) if hashes[index] in new]
            self._events.saving(request.chain, blocks)
        request.saved = last
        return plans

    def step(self, saves: list[BlockPlan], chunks: tuple[tuple[int, int], ...]) -> StepPlan:
        """Returns the plan of the step that vLLM is about to run: it computes these token ranges, one per request."""
        loads, self._loads = self._loads, []
        return StepPlan(loads, saves, chunks)

    def preempted(self, request_id: str) -> None:
        """A request lost its blocks: the store may be asked about it again."""
        request = self._requests.get(request_id)
        if request is not None:
            request.lookup, request.found, request.claimed, request.loads = None, None, False, ()

    def finished(self, request_id: str) -> None:
        """A request ended."""
        request = self._requests.pop(request_id, None)
        if request is not None and request.lookup is not None:
            request.lookup.dropped = True

    def learn(self, observations: Iterable[Transfer | Step]) -> None:
        """Takes the workers' measurements."""
        for observed in observations:
            if isinstance(observed, Step):
                self._gate.stepped(observed)
            else:
                self._gate.transferred(observed)
                self._refused = False

    @property
    def wants_probe(self) -> bool:
        """Returns whether a hit was not claimed and the link was not measured for long: without a measurement it would never be
        used again.
        """
        return self._refused and self._gate.is_stale

    def _names(self, request: _Request, blocks: int) -> list[BlockHash]:
        """Returns the names of the first blocks. Each is computed once, although a growing request is asked about repeatedly."""
        known = request.hashes
        known += page_hashes(known[-1] if known else self._root, request.block_hashes[len(known) : blocks])
        return known[:blocks]

    def _work(self, tokens: int, front: int, hit_end: int) -> Work:
        layout = self._layout
        return Work(
            tokens, layout.block_tokens, self._chunk_tokens, layout.page_bytes, front, hit_end, hit_end, hit_end, layout.layers
        )

    def _usable_blocks(self, prompt_tokens: int) -> int:
        return (prompt_tokens - 1) // self._layout.block_tokens

    def _start_lookup(self, request: _Request, blocks: int) -> Lookup:
        request.lookup = self._lookups.start(request.block_hashes[:blocks])
        return request.lookup

    def _look_up(self, request: _Request, blocks: int) -> int | None:
        """Returns how many of a request's first `blocks` pages the store has; None while it has not answered."""
        lookup = request.lookup or self._start_lookup(request, blocks)
        if not lookup.done:
            if self._clock.now_ms() - lookup.began_ms < self._lookup_ms_max:
                return None
            lookup.dropped = True  # if it has not begun; otherwise its end tells the tier whether the store answers
            request.lookup = None
            return 0
        request.lookup = None
        if len(request.hashes) < len(lookup.names):
            request.hashes = lookup.names
        self._known.add(lookup.names[: lookup.found])
        self._known.discard(lookup.names[lookup.found :])
        if self._events is not None and request.chain is not None and not lookup.failed:
            self._events.found(request.chain, lookup.names, lookup.found)
        return lookup.found

    def _store_answers(self) -> bool:
        """Returns whether to ask the store. While it fails, a look-up for no request finds out when it answers again."""
        if not self._tier.is_failing:
            return True
        if not self._tier.is_paused and (self._probe is None or self._probe.done):
            self._probe = self._lookups.start(())
        return False
