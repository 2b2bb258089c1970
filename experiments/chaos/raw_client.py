"""`python -m experiments.chaos.raw_client`: a client of the store that verifies every byte and reports its calls.

Reads chains of pages in a random order, writes missing pages, and prints one line of JSON per call (`observation.Call`). The
content of a page follows from its hash, so any number of clients can check each other's pages.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

import attnstore
from attnstore.command_line import CommandParser
from attnstore.errors import AttnStoreError, Retryable
from attnstore.option_types import MILLISECONDS
from experiments.chaos.observation import Call
from experiments.options import POSITIVE, SEED

_LAYOUT: Final = attnstore.PageLayout(layers=8, kv_heads=2, head_dim=64, dtype=attnstore.DType.BF16)
_CHAINS: Final = 60
_BLOCKS: Final = 8
_LEASE_MS: Final = 5_000
_T = TypeVar("_T")


class RawClient:
    """The chains, their contents, and the calls."""

    def __init__(
        self, client: attnstore.Client | attnstore.ClusterClient, name: str, deadline_ms: float, say: Callable[[Call], None]
    ) -> None:
        self._client = client
        self._name = name
        self._deadline_ms = deadline_ms
        self._say = say
        self._namespace = attnstore.namespace(_LAYOUT, model=b"chaos")
        tokens = _BLOCKS * _LAYOUT.block_tokens
        self._chains = [
            attnstore.block_hashes(self._namespace, range(number * tokens, (number + 1) * tokens), _LAYOUT.block_tokens)
            for number in range(_CHAINS)
        ]
        self._content = {
            page_hash: hashlib.shake_128(page_hash).digest(_LAYOUT.page_bytes) for chain in self._chains for page_hash in chain
        }
        self._buffers = [bytearray(_LAYOUT.page_bytes) for _ in range(_BLOCKS)]

    def register(self) -> None:
        """Registers the namespace, repeatedly until a node answers."""
        while self._call("register", lambda: self._client.register_layout(self._namespace, _LAYOUT)) is None:
            time.sleep(0.2)

    def turn(self, draws: random.Random) -> None:
        """Reads one chain, and writes its missing pages."""
        chain = draws.choice(self._chains)
        for buffer in self._buffers:
            buffer[:64] = bytes(64)  # clears the buffers, so that earlier bytes cannot pass for new ones
        found = self._call("match", lambda: self._client.match(self._namespace, [chain], lease_ms=_LEASE_MS))
        hits = found.hits[0] if found is not None else 0
        good = self._read(chain, hits, found.lease if found is not None else None)
        if found is not None and found.lease is not None:
            lease = found.lease
            self._call("release", lambda: self._client.release(lease))
        missing = chain[good:]
        if missing:
            pages = [self._content[page_hash] for page_hash in missing]
            self._call("write", lambda: self._client.write(self._namespace, missing, pages))

    def hurry(self, draws: random.Random, deadline_ms: float) -> None:
        """Requests one chain with too little time."""
        chain = draws.choice(self._chains)
        self._call("hurry", lambda: self._client.match(self._namespace, [chain], deadline_ms=deadline_ms), deadline_ms)
        read = functools.partial(self._client.read, self._namespace, chain, self._buffers, deadline_ms=deadline_ms)
        self._call("hurry", read, deadline_ms)

    def _read(self, chain: list[attnstore.BlockHash], hits: int, lease: attnstore.Lease | None) -> int:
        """Reads the leading pages that hit. Returns how many were good. The call counts the whole chain as requested."""
        began_s = time.monotonic()
        good = wrong = 0
        error: AttnStoreError | None = None
        if hits:
            try:
                answer = self._client.read(self._namespace, chain[:hits], self._buffers[:hits], lease=lease)
                good, error = answer.leading_hits, answer.error
                pairs = zip(chain[:hits], self._buffers, answer.statuses, strict=False)
                wrong = sum(status.is_hit and buffer != self._content[page_hash] for page_hash, buffer, status in pairs)
            except AttnStoreError as raised:
                error = raised
        self._report("read", began_s, error, asked=len(chain), hits=good, wrong=wrong)
        return good

    def _call(self, verb: str, call: Callable[[], _T], deadline_ms: float | None = None) -> _T | None:
        began_s = time.monotonic()
        error: AttnStoreError | None = None
        result: _T | None = None
        try:
            result = call()
        except AttnStoreError as raised:
            error = raised
        self._report(verb, began_s, error, deadline_ms=deadline_ms)
        return result

    def _report(
        self,
        verb: str,
        began_s: float,
        error: AttnStoreError | None,
        *,
        asked: int = 0,
        hits: int = 0,
        wrong: int = 0,
        deadline_ms: float | None = None,
    ) -> None:
        self._say(
            Call(
                who=self._name,
                verb=verb,
                began_s=began_s,
                ended_s=time.monotonic(),
                deadline_s=(deadline_ms or self._deadline_ms) / 1000,
                asked=asked,
                hits=hits,
                wrong=wrong,
                error=type(error).__name__ if error is not None else None,
                is_miss=isinstance(error, Retryable),
            )
        )


def print_call(call: Call) -> None:
    """Prints the result of a call, for `experiments.chaos.run` to read."""
    # In one write, because all threads and standard error share the container's log.
    sys.stdout.write(call.to_line() + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs until its time is over."""
    parser = CommandParser("python -m experiments.chaos.raw_client")
    parser.add_argument("--store", required=True, metavar="URL")
    parser.add_argument("--name", default="client")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--seconds", type=POSITIVE, default=10.0)
    parser.add_argument("--turns-per-s", type=POSITIVE, default=10.0, help="chains read a second, at most")
    parser.add_argument("--deadline-ms", type=MILLISECONDS, default=2_000.0)
    options = parser.parse_args()
    end_s = time.monotonic() + options.seconds
    draws = random.Random(options.seed)
    with attnstore.connect(options.store, deadline_ms=options.deadline_ms) as store:
        client = RawClient(store, options.name, options.deadline_ms, print_call)
        client.register()
        while (began_s := time.monotonic()) < end_s:
            client.turn(draws)
            time.sleep(max(0.0, began_s + 1 / options.turns_per_s - time.monotonic()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
