"""The runs of a prefix that lie together, and what is known of them while a cluster is asked.

Owns: how answers of several nodes become the answer of one store, purely. Invariant: a page counts as a hit only if it and all
pages before it in its prefix were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from attnstore.core.hashing import segment_key


@dataclass(slots=True)
class Run:
    """Consecutive blocks of one prefix that share a segment, and how many of them were found, from the first on.

    `asked`: the nodes that were asked for what is missing.
    """

    prefix: int
    key: bytes
    hashes: Sequence[bytes]
    hits: int = 0
    asked: set[str] = field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        """Every page was found."""
        return self.hits == len(self.hashes)

    @property
    def rest(self) -> Sequence[bytes]:
        """From the first page on that was not found."""
        return self.hashes[self.hits :]


def runs_of(prefixes: Sequence[Sequence[bytes]]) -> list[Run]:
    """The prefixes cut where the segment changes, in order."""
    return [
        Run(number, segment_key(prefix[begin]), prefix[begin:end])
        for number, prefix in enumerate(prefixes)
        for begin, end in _segments(prefix)
    ]


def leading_hits(prefixes: int, runs: Sequence[Run]) -> tuple[int, ...]:
    """For each prefix, the hits of its runs up to the first run that is not complete."""
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
