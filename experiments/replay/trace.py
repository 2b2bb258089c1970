"""Traces in Mooncake's format: one JSON object per line.

Owns: reading and checking such a file. Invariant: the result is well-formed, whatever the file contains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore.limits import HASH_BYTES

BLOCK_TOKENS: Final = 512
"""Tokens of the block that one id of the format names."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt: its arrival, the names of its blocks, and the number of tokens that followed it. The last block may be
    incomplete; the format names it too.
    """

    arrival_ms: float
    hashes: tuple[BlockHash, ...]
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests in the order of the file, which is the order of arrival."""

    requests: tuple[TraceRequest, ...]

    @property
    def blocks(self) -> int:
        """Blocks of all prompts, repeated ones counted each time."""
        return sum(len(request.hashes) for request in self.requests)

    @property
    def longest_blocks(self) -> int:
        """Blocks of the longest prompt."""
        return max(len(request.hashes) for request in self.requests)

    @property
    def requests_per_s(self) -> float:
        """Mean rate of arrival; infinite if all arrive at once."""
        duration_ms = self.requests[-1].arrival_ms - self.requests[0].arrival_ms
        return len(self.requests) / duration_ms * 1000 if duration_ms else float("inf")


def read_trace(path: Path) -> Trace:
    """Reads a trace: `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}` per line.

    Raises `InvalidArgument`, with the line, for a file that cannot be read, has other content, or is empty.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            requests = tuple(_requests(path, lines))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"trace {path} cannot be read: {error}") from None
    if not requests:
        raise InvalidArgument(f"trace {path} has no requests")
    return Trace(requests)


def _requests(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _request(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InvalidArgument(f"{path}:{number} is not a request in Mooncake's format ({problem})") from None


def _request(fields: dict[str, Any]) -> TraceRequest:
    hashes = tuple(_hash(hash_id) for hash_id in fields["hash_ids"])
    if not hashes:
        raise ValueError("no blocks")
    return TraceRequest(float(fields["timestamp"]), hashes, int(fields.get("output_length", 0)))


def _hash(hash_id: int) -> BlockHash:
    return BlockHash(hash_id.to_bytes(HASH_BYTES, "big"))
