"""The runs of a prefix that are placed together, and their state while a cluster is asked.

Owns: merging the answers of several nodes into the answer of one store. Pure. Invariant: a page counts as a hit only if it and all
pages before it in its prefix were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from attnstore.core.hashing import segment_key


@dataclass(slots=True)
class Run:
    """Consecutive blocks of one prefix in one segment, and how many leading ones were found.

    `asked`: the nodes that were asked for the missing ones.
    """

    prefix: int
    key: bytes
    hashes: Sequence[bytes]
    hits: int = 0
    asked: set[str] = field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        """True if every page was found."""
        return self.hits == len(self.hashes)

    @property
    def rest(self) -> Sequence[bytes]:
        """The hashes from the first missing page on."""
        return self.hashes[self.hits :]


def runs_of(prefixes: Sequence[Sequence[bytes]]) -> list[Run]:
    """Splits the prefixes at segment boundaries, in order."""
    return [
        Run(number, segment_key(prefix[begin]), prefix[begin:end])
        for number, prefix in enumerate(prefixes)
        for begin, end in _segments(prefix)
    ]


def leading_hits(prefixes: int, runs: Sequence[Run]) -> tuple[int, ...]:
    """Returns for each prefix the hits of its runs up to the first incomplete run."""
    hits = [0] * prefixes
    ended = [False] * prefixes
    for run in runs:
        if not ended[run.prefix]:
            hits[run.prefix] += run.hits
            ended[run.prefix] = not run.is_complete
    return tuple(hits)


def _segments(hashes: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    begin = 0
    keys = [segment_key(page_hash) for page_hash in hashes]
    for index in range(1, len(keys) + 1):
        if index == len(keys) or keys[index] != keys[begin]:
            yield begin, index
            begin = index
