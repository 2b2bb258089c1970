"""The outputs of an engine: tokens, and counts of its work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnstore_worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, and the text that became final with it. `logits` are the fp32 logits `[vocabulary]` from which it was
    drawn, on the host; None unless the sequence's `SamplingParams.logits` asks for them.
    """

    sequence: Sequence
    token_id: int
    logits: Tensor | None
    text: str


@dataclass(frozen=True, slots=True)
class BatchingStatistics:
    """A snapshot. `loading` of the `running` sequences wait for pages. `steps`, `tokens_computed`, `tokens_generated`,
    `preemptions`, `failures` (sequences that ended as FAILED), `drafts_checked` and `drafts_accepted` count since the start.
    """

    waiting: int
    running: int
    loading: int
    steps: int
    tokens_computed: int
    tokens_generated: int
    preemptions: int
    failures: int
    drafts_checked: int
    drafts_accepted: int
