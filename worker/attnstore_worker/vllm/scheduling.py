"""The scheduler's half: which pages of a request the store has, and what each step loads and saves.

Owns: each request's look-up and blocks. Invariants: the engine's loop never waits for the store: the scheduler asks again until a
look-up has its answer, and a late or failed look-up is a miss. While the store fails, it is asked on behalf of no request. A page
is saved by the step that completes its last token, or by a request's first step if vLLM had it; a block that vLLM has given up is
in no page. Called by one thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.planning.split import Work
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.known import KnownPages
from attnstore_worker.vllm.lookups import Answer, Lookup, Lookups, StoredGroup, StoredSource
from attnstore_worker.vllm.page_groups import PageGroup, told_group
from attnstore_worker.vllm.plan import NO_BLOCK, Pages, RequestLoad, StepPlan
from attnstore_worker.vllm.store_events import Chain, StoreEvents

_NOTHING = Answer(0, (), (), 0)
_NULL_BLOCK = 0
"""vLLM's number in the place of a block that a group with a window has given up, or never had."""


@dataclass(slots=True)
class _Blocks:
    """A request's pages of one group. `names` are those of its first pages; both lists grow."""

    names: list[BlockHash] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    loads: Pages | None = None
    first_load_tokens: int = 0


@dataclass(slots=True)
class _Request:
    """`block_hashes` is vLLM's own list, which grows with the request."""

    block_hashes: Sequence[bytes]
    groups: list[_Blocks]
    lookup: Lookup | None = None
    hit: Answer | None = None  # once the look-up is over
    claimed: bool = False  # vLLM has given it blocks, so its load is decided
    local_tokens: int = 0  # those that vLLM had when it asked last
    chain: Chain | None = None  # if there are events


class SchedulerSide:
    """Looks up pages of `sources`, of which the first are the engine's own, and claims the part of a hit that `gate` chooses. vLLM
    computes at most `chunk_tokens` in a step; a request waits at most `lookup_ms_max` for the store's answer. Unless vLLM
    `continues` a prompt whose first tokens were loaded, a hit is all tokens but the last, or none. `events` is told of what the
    store has of the first group that keeps all tokens.
    """

    def __init__(
        self,
        sources: Sequence[StoredSource],
        gate: Gate,
        clock: Clock,
        *,
        lookup_ms_max: float,
        chunk_tokens: int,
        continues: bool = True,
        events: StoreEvents | None = None,
    ) -> None:
        self._sources = sources
        self._groups = groups = sources[0].groups
        self._tier = groups[0].tier
        self._gate = gate
        self._clock = clock
        self._lookup_ms_max = lookup_ms_max
        self._chunk_tokens = chunk_tokens
        self._continues = continues
        self._events = events
        told = told_group([each.group for each in groups])
        self._told = told.index if told is not None else None
        self._block_tokens = lcm(*(each.group.block_tokens for each in groups))
        self._layers = sum(len(each.group.layer_names) for each in groups)
        self._lookups = Lookups(sources)
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
        request = self._request(request_id, block_hashes)
        request.chain = chain
        if request.lookup is None and self._store_answers():
            self._start_lookup(request, prompt_tokens - 1)

    def hit_tokens(self, request_id: str, block_hashes: Sequence[bytes], prompt_tokens: int, computed_tokens: int) -> int | None:
        """Returns how many tokens after `computed_tokens` (whole blocks) to fetch; None while the store has not answered. These are
        the leading part of what the store has that `Gate` chooses.

        The last token is never fetched, because it must be computed to have logits. A look-up claims nothing: vLLM asks again if it
        had no blocks for the request. After `allocated` the answer is 0, even if the load fails, until the request is preempted.
        """
        request = self._request(request_id, block_hashes)
        usable = prompt_tokens - 1
        if request.claimed or usable < computed_tokens + self._block_tokens or not self._store_answers():
            return 0
        if request.hit is None:
            request.hit = self._look_up(request, usable)
            if request.hit is None:
                return None
        end = _last(request.hit.ends, usable)
        if end <= computed_tokens:
            return 0
        front = computed_tokens // self._block_tokens
        source = self._sources[request.hit.source]
        blocks = self._gate.blocks_to_fetch(self._work(source, prompt_tokens, computed_tokens, end))
        end = _last(request.hit.ends, (front + blocks) * self._block_tokens)
        self._refused |= end <= computed_tokens
        if end < usable and not self._continues:
            return 0
        request.local_tokens = computed_tokens
        return max(0, end - computed_tokens)

    def allocated(self, request_id: str, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """Records the blocks that vLLM gave a request, of each group: those it had come first, then those of the `external_tokens`
        to be loaded.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        request.claimed = True
        if external_tokens == 0 or request.hit is None:
            return
        begin, end = request.local_tokens, request.local_tokens + external_tokens
        groups = self._sources[request.hit.source].groups
        for each, own, blocks, names, ids in zip(groups, self._groups, request.groups, request.hit.names, block_ids, strict=True):
            pages = _unloaded(each.group, begin, end)
            blocks.loads = Pages(each.group.index, names[pages.start : pages.stop], _blocks_to_load(each.group, ids, pages, begin))
            blocks.first_load_tokens, blocks.saved = pages.start * each.group.page_tokens, end // own.group.page_tokens
        parts = tuple(blocks.loads for blocks in request.groups if blocks.loads)
        self._loads.append(RequestLoad(request_id, parts, request.hit.source))

    def failed(self, block_ids: Collection[int]) -> None:
        """Records blocks of the only group that were not loaded: vLLM computes them, and they are saved then."""
        for request in self._requests.values():
            for each, blocks in zip(self._groups, request.groups, strict=True):
                loads = blocks.loads
                if loads is None:
                    continue
                place = next((place for place, block_id in enumerate(loads.block_ids) if block_id in block_ids), None)
                if place is not None:
                    self._known.discard(loads.names)
                    tokens = blocks.first_load_tokens + place * each.group.block_tokens
                    blocks.saved, blocks.loads = tokens // each.group.page_tokens, None

    def failed_requests(self, request_ids: Iterable[str]) -> None:
        """Records requests whose loads have failed: vLLM computes them from their first token."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            for blocks in request.groups if request is not None else ():
                if blocks.loads is not None:
                    self._known.discard(blocks.loads.names)
                blocks.saved, blocks.loads = 0, None

    def scheduled(
        self, request_id: str, new_block_ids: Sequence[Sequence[int]] | None, *, tokens_after: int, restarted: bool
    ) -> list[Pages]:
        """Returns the pages of a request that are complete after this step and that the store is not known to have.

        `new_block_ids`, of each group, are added to those of earlier steps, or replace them if the request was `restarted`.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        saves = []
        for index, (each, blocks) in enumerate(zip(self._groups, request.groups, strict=True)):
            if restarted:
                blocks.block_ids.clear()
            blocks.block_ids += new_block_ids[index] if new_block_ids is not None else ()
            pages = self._saved(each, request, blocks, tokens_after)
            if pages:
                names = self._names(each, blocks, request.block_hashes, pages[-1] + 1)
                new = [page for page in pages if names[page] not in self._known]
                if new:
                    saves.append(self._save(each, index, request, new))
        return saves

    def step(self, saves: list[Pages], chunks: tuple[tuple[int, int], ...]) -> StepPlan:
        """Returns the plan of the step that vLLM is about to run: it computes these token ranges, one per request."""
        loads, self._loads = self._loads, []
        return StepPlan(loads, saves, chunks)

    def preempted(self, request_id: str) -> None:
        """A request lost its blocks: the store may be asked about it again."""
        request = self._requests.get(request_id)
        if request is not None:
            request.lookup, request.hit, request.claimed = None, None, False
            for blocks in request.groups:
                blocks.loads = None

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

    def _request(self, request_id: str, block_hashes: Sequence[bytes]) -> _Request:
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = _Request(block_hashes, [_Blocks() for _ in self._groups])
        return request

    def _names(self, each: StoredGroup, blocks: _Blocks, block_hashes: Sequence[bytes], pages: int) -> list[BlockHash]:
        """Returns the names of the first pages. Each is computed once, although a growing request is asked about repeatedly."""
        known = blocks.names
        if len(known) < pages:
            known += each.names(known[-1] if known else each.root, block_hashes, range(len(known), pages))
        return known[:pages]

    def _saved(self, each: StoredGroup, request: _Request, blocks: _Blocks, tokens_after: int) -> Sequence[int]:
        """Returns the pages that can be saved after a step, and takes them as saved."""
        group = each.group
        last = min(
            tokens_after // group.page_tokens,
            len(request.block_hashes) // group.page_hashes,
            len(blocks.block_ids) // group.page_blocks,
        )
        first, blocks.saved = blocks.saved, max(blocks.saved, last)
        if group.window is None:
            return range(first, last)
        if group.state:
            first = max(first, last - 1) if last * group.page_tokens == tokens_after else last
        return [page for page in range(first, last) if _NULL_BLOCK not in _blocks_of(group, blocks.block_ids, page)]

    def _save(self, each: StoredGroup, index: int, request: _Request, pages: Sequence[int]) -> Pages:
        blocks = request.groups[index]
        names = [blocks.names[page] for page in pages]
        self._known.add(names)
        if self._events is not None and request.chain is not None and index == self._told:
            self._events.saving(request.chain, zip(pages, names, strict=True))
        ids = [block_id for page in pages for block_id in _blocks_of(each.group, blocks.block_ids, page)]
        return Pages(each.group.index, names, ids)

    def _work(self, source: StoredSource, tokens: int, begin: int, end: int) -> Work:
        """What the rest of a hit takes. Groups with a window have fewer pages than tokens, so a block's bytes are an average."""
        front, hit_end = begin // self._block_tokens, end // self._block_tokens
        size_bytes = sum(len(_unloaded(each.group, begin, end)) * each.group.layout.page_bytes for each in source.groups)
        page_bytes = -(-size_bytes * source.parts // (hit_end - front))
        return Work(tokens, self._block_tokens, self._chunk_tokens, page_bytes, front, hit_end, hit_end, hit_end, self._layers)

    def _start_lookup(self, request: _Request, tokens: int) -> Lookup:
        request.lookup = self._lookups.start(request.block_hashes, tokens)
        return request.lookup

    def _look_up(self, request: _Request, tokens: int) -> Answer | None:
        """Returns what the store has of a request's first `tokens` tokens; None while it has not answered."""
        lookup = request.lookup or self._start_lookup(request, tokens)
        if not lookup.done:
            if self._clock.now_ms() - lookup.began_ms < self._lookup_ms_max:
                return None
            lookup.dropped = True  # if it has not begun; otherwise its end tells the tier whether the store answers
            request.lookup = None
            return _NOTHING
        request.lookup = None
        own = lookup.own
        if own is None or lookup.hit is None:
            return _NOTHING
        for blocks, names, stored, missing in zip(request.groups, own.names, own.stored, own.missing, strict=True):
            if len(blocks.names) < len(names):
                blocks.names = list(names)
            self._known.add(stored)
            self._known.discard(missing)
        if self._events is not None and request.chain is not None and self._told is not None and not lookup.failed:
            self._events.found(request.chain, own.names[self._told], len(own.stored[self._told]))
        return lookup.hit

    def _store_answers(self) -> bool:
        """Returns whether to ask the store. While it fails, a look-up for no request finds out when it answers again."""
        if not self._tier.is_failing:
            return True
        if not self._tier.is_paused and (self._probe is None or self._probe.done):
            self._probe = self._lookups.start((), 0)
        return False


def _last(ends: Sequence[int], tokens: int) -> int:
    """Returns the largest of `ends` that is at most `tokens`; 0 if there is none."""
    place = bisect_right(ends, tokens)
    return ends[place - 1] if place else 0


def _unloaded(group: PageGroup, begin: int, end: int) -> range:
    """Returns the pages that continuing after `end` tokens needs beside those of the first `begin` tokens."""
    needed = group.needed(end)
    return range(max(needed.start, begin // group.page_tokens), needed.stop)


def _blocks_of(group: PageGroup, block_ids: Sequence[int], page: int) -> Sequence[int]:
    return block_ids[page * group.page_blocks : (page + 1) * group.page_blocks]


def _blocks_to_load(group: PageGroup, block_ids: Sequence[int], pages: range, begin: int) -> list[int]:
    """Returns the blocks of pages, and `NO_BLOCK` for those before `begin` tokens, which vLLM has."""
    blocks = range(pages.start * group.page_blocks, pages.stop * group.page_blocks)
    own = begin // group.block_tokens
    return [NO_BLOCK] * len(blocks[: max(0, own - blocks.start)]) + [block_ids[index] for index in blocks if index >= own]
