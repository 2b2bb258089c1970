"""A store that answers when the test says so, and the scheduler's half asking it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from attnstore.types import MatchResult
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.testing import single_group
from attnstore_worker.vllm.identity import page_layout, vllm_namespace
from attnstore_worker.vllm.scheduling import SchedulerSide
from tests.samples import eventually

TOKENS = 16
LAYOUT = page_layout(layers=2, layer_block_bytes=2 * 3 * TOKENS * 8, kv_heads=3, block_tokens=TOKENS, tp_rank=0, tp_size=1)
ROOT = vllm_namespace(LAYOUT, {"model": "m"}, tenant_salt="")
GROUP = single_group(LAYOUT, ("a", "b"))
FOREIGN = [bytes((index,)) * 32 for index in range(10)]
CHUNK_TOKENS = 2048


def load(size_bytes: int, elapsed_ms: float) -> Transfer:
    return Transfer(Tier.REMOTE, TransferKind.READ, 0.0, elapsed_ms, 1, 1, size_bytes, failed=False)


STEP = Step(0.0, 10_000.0, ((0, 1000),))
"""A prefill of 100 tokens a second."""
FAST = (*[load(1 << 20, 1.0)] * 8, STEP)
"""A link of 1 GB/s."""
SLOW = (*[load(1 << 20, 10_000_000.0)] * 8, STEP)
"""A link of 100 B/s."""


class Answers:
    """A store that has the first `pages` of any prompt and answers nothing while it is not `open`. `asked`: what it answered."""

    def __init__(self) -> None:
        self.pages = 6
        self.asked: list[Sequence[bytes]] = []
        self.sizes: list[int] = []
        self.begun = 0
        self.calls = 0
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def register_layout(self, *_: Any, **__: Any) -> None:
        """Knows every namespace."""

    def match(self, _space: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int, deadline_ms: float) -> MatchResult:
        del deadline_ms
        assert not lease_ms, "nobody would release it"
        self.begun += 1
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.calls += 1
        self.asked += prefixes
        self.sizes.append(sum(map(len, prefixes)))
        return MatchResult(tuple(min(self.pages, len(prefix)) for prefix in prefixes), None)


def settled(side: SchedulerSide, request: str, prompt_tokens: int = 160, computed: int = 0) -> int:
    """Asks until there is an answer, as vLLM's scheduler does."""
    answers: list[int] = []

    def answered() -> bool:
        hit = side.hit_tokens(request, FOREIGN, prompt_tokens, computed)
        answers.extend(() if hit is None else (hit,))
        return bool(answers)

    assert eventually(answered, every_s=0.0001), "no answer"
    return answers[0]
