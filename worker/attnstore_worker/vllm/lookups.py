"""Look-ups beside the engine's loop: where a hit of each prompt may end.

Owns: the threads that ask, and the look-ups that wait for one. Invariants: neither starting a look-up nor reading its answer waits
for the store, a lock or a thread; names are hashed by the threads, because a long prompt has thousands of blocks. Look-ups that
wait together are one call for each group, so that many prompts which arrive at once cost as many round trips as one.

A hit is a prefix of which every group has what it needs. First the groups that need all pages are asked how many leading ones there
are. Groups that need only the latest pages, or a state, are then asked for the pages that the longest of these prefixes need.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple

from attnstore import tasks
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.limits import CHANNEL_READ_HASHES_MAX, HASHES_MAX
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.identity import page_hashes
from attnstore_worker.vllm.page_groups import PageGroup, hit_unit

LOOKUP_THREADS: Final = 4
"""Calls under way at once: a prompt that arrives while one is under way does not wait for its end."""
_NAMES_MAX: Final = HASHES_MAX - CHANNEL_READ_HASHES_MAX
"""Of one prompt and group. Look-ups are joined while they have fewer than CHANNEL_READ_HASHES_MAX names, and all must fit one call.
"""
_ENDS_MAX: Final = 64
"""The longest prefixes, of which groups with a window are asked."""


class StoredGroup(NamedTuple):
    """A group, the namespace of its pages, and the store."""

    group: PageGroup
    root: Namespace
    tier: RemoteTier

    def names(self, parent: bytes, block_hashes: Sequence[bytes], pages: range) -> list[BlockHash]:
        """Returns the names of some pages of a prompt with these of vLLM's hashes. `parent`: the name of the page before them."""
        each = self.group.page_hashes
        return page_hashes(parent, block_hashes[(pages.start + 1) * each - 1 : pages.stop * each : each])


class StoredSource(NamedTuple):
    """Pages that a rank can read: its own, or those of engines of another tensor-parallel size. It reads `parts` of them where it
    would read one of its own.
    """

    groups: Sequence[StoredGroup]
    parts: int = 1


class Answer:
    """What the store has of one source: after how many tokens a hit may end (`ends`, ascending), the names of the first pages of
    each group, and those that are `stored` and those that are `missing`.
    """

    __slots__ = ("ends", "missing", "names", "source", "stored")

    def __init__(self, source: int, groups: Sequence[StoredGroup], block_hashes: Sequence[bytes], tokens: int) -> None:
        self.source = source
        self.names = [each.names(each.root, block_hashes, range(_pages(each.group, tokens))) for each in groups]
        self.ends: Sequence[int] = ()
        self.stored: list[list[BlockHash]] = [[] for _ in groups]
        self.missing: list[list[BlockHash]] = [[] for _ in groups]


class Lookup:
    """One prompt's look-up: the answer for the rank's `own` pages, the one with the longest `hit`, and whether the store `failed`
    to answer for all of them. These are set before `done`.

    `block_hashes` are vLLM's of `tokens` tokens. A look-up that was `dropped` before its turn is not made.
    """

    __slots__ = ("began_ms", "block_hashes", "done", "dropped", "failed", "hit", "own", "tokens")

    def __init__(self, block_hashes: Sequence[bytes], tokens: int, began_ms: float) -> None:
        self.block_hashes = block_hashes
        self.tokens = tokens
        self.began_ms = began_ms
        self.own: Answer | None = None
        self.hit: Answer | None = None
        self.failed = True
        self.done = False
        self.dropped = False


class Lookups:
    """Asks about prompts, of every group of the first of `sources`; and of each other source, where the answer is not all of a
    prompt. `start` and `close` are called by one thread.
    """

    def __init__(self, sources: Sequence[StoredSource]) -> None:
        self._sources = [_Source(number, source.groups) for number, source in enumerate(sources)]
        self._tier = sources[0].groups[0].tier
        self._waiting: SimpleQueue[Lookup | None] = SimpleQueue()  # None ends a thread
        for _ in range(LOOKUP_THREADS):
            tasks.supervised_thread("lookup", self._run)

    def start(self, block_hashes: Sequence[bytes], tokens: int) -> Lookup:
        """Starts a look-up of a prompt's first `tokens` tokens; of none, it finds out whether the store answers."""
        lookup = Lookup(block_hashes, tokens, self._tier.now_ms())
        self._waiting.put(lookup)
        return lookup

    def close(self) -> None:
        """Ends the threads, without waiting for their calls."""
        for _ in range(LOOKUP_THREADS):
            self._waiting.put(None)

    def _run(self) -> None:
        while (asked := self._take()) is not None:
            self._ask([lookup for lookup in asked if not lookup.dropped])

    def _take(self) -> list[Lookup] | None:
        """Waits for look-ups. Returns those that one call asks for; None at the end."""
        taken: list[Lookup] = []
        names = 0
        lookup = self._waiting.get()
        while lookup is not None:
            taken.append(lookup)
            names += len(lookup.block_hashes)
            if names >= CHANNEL_READ_HASHES_MAX:
                return taken
            try:
                lookup = self._waiting.get_nowait()
            except Empty:
                return taken
        if taken:
            self._waiting.put(None)  # the end is taken next
        return taken or None

    def _ask(self, lookups: Sequence[Lookup]) -> None:
        try:
            asked = lookups
            for source in self._sources:
                if not asked:
                    return
                answers, failed = source.ask(asked)
                for lookup, answer in zip(asked, answers, strict=True):
                    if source.number == 0:
                        lookup.own = lookup.hit = answer
                        lookup.failed = failed
                    elif _longest(answer) > _longest(lookup.hit):
                        lookup.hit = answer
                asked = [] if failed else [lookup for lookup in asked if lookup.tokens - _longest(lookup.hit) >= source.unit]
        finally:
            for lookup in lookups:
                lookup.done = True


class _Source:
    """Asks about the groups of one source."""

    def __init__(self, number: int, groups: Sequence[StoredGroup]) -> None:
        self.number = number
        self._groups = groups
        self.unit = hit_unit([each.group for each in groups])
        self._asks_prefixes = any(each.group.window is None for each in groups)

    def ask(self, lookups: Sequence[Lookup]) -> tuple[list[Answer], bool]:
        """Returns the answers, and whether a call failed."""
        answers = [Answer(self.number, self._groups, lookup.block_hashes, lookup.tokens) for lookup in lookups]
        failed = self._ask_prefixes(answers)
        return answers, self._ask_windows(answers) or failed

    def _ask_prefixes(self, answers: Sequence[Answer]) -> bool:
        """Asks the groups that need all pages. Returns whether a call failed."""
        failed = False
        ends = [self._named_tokens(answer) for answer in answers]
        for index, each in enumerate(self._groups):
            if each.group.window is not None:
                continue
            result = each.tier.look_up([answer.names[index] for answer in answers])
            failed |= result.error is not None
            for place, (answer, pages) in enumerate(zip(answers, result.hits, strict=True)):
                names = answer.names[index]
                answer.stored[index], answer.missing[index] = names[:pages], names[pages:]
                ends[place] = min(ends[place], pages * each.group.page_tokens)
        for answer, end in zip(answers, ends, strict=True):
            answer.ends = range(self.unit, end + 1, self.unit)
        return failed

    def _ask_windows(self, answers: Sequence[Answer]) -> bool:
        """Asks the other groups for what the longest prefixes need. Returns whether a call failed."""
        failed = False
        for index, each in enumerate(self._groups):
            if each.group.window is None:
                continue
            asked: list[list[int]] = []
            for answer in answers:
                answer.ends = answer.ends[-_ENDS_MAX:]
                asked.append(sorted({page for end in answer.ends for page in each.group.needed(end)}))
            names = [[answer.names[index][page]] for answer, pages in zip(answers, asked, strict=True) for page in pages]
            if not names and self._asks_prefixes:  # otherwise this finds out whether the store answers
                continue
            result = each.tier.look_up(names or [[]])
            failed |= result.error is not None
            hits = iter(result.hits)
            for answer, pages in zip(answers, asked, strict=True):
                found = {page for page in pages if next(hits)}
                answer.ends = [end for end in answer.ends if found.issuperset(each.group.needed(end))]
                answer.stored[index] = [answer.names[index][page] for page in pages if page in found]
                answer.missing[index] = [answer.names[index][page] for page in pages if page not in found]
        return failed

    def _named_tokens(self, answer: Answer) -> int:
        return min(len(names) * each.group.page_tokens for each, names in zip(self._groups, answer.names, strict=True))


def _pages(group: PageGroup, tokens: int) -> int:
    return min(tokens // group.page_tokens, _NAMES_MAX)


def _longest(answer: Answer | None) -> int:
    return answer.ends[-1] if answer is not None and answer.ends else 0
