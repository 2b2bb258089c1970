"""One prompt and its continuation in the engine.

Owns: the tokens of a sequence, how many of them have their KV in the pool, and the times of its events. Invariant:
`computed_tokens <= len(token_ids)`; a RUNNING sequence has a table and at least one token to compute, any other has no table and
therefore no block. A running sequence is LOADING while some of its blocks may still come from a lower tier: then it computes only
its claimed tokens, up to `computable_tokens`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from attnstore.core.hashing import BlockHash
from attnstore.errors import AttnStoreError
from attnstore_worker.cache import Admission, Load
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine.attend_state import AttendState
from attnstore_worker.engine.sampler import Sampler, SamplingParams
from attnstore_worker.engine.text import TextStream


class FinishReason(enum.Enum):
    """Why a sequence ended. OVERLOADED: transfers held the pool for longer than their deadline. REMOTE_LOST: its context does not
    fit into the pool, and the store does not keep or answer for the rest of it. FAILED: `Sequence.error` says by what.
    """

    STOP = "stop"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    POOL_FULL = "pool_full"
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    FAILED = "failed"
    REMOTE_LOST = "remote_lost"


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` are the prompt's `prompt_tokens` tokens followed by the generated ones. Times are on the engine's clock.

    `hashes` name its first complete blocks, `extra_keys` are part of all of these names, `table` has the blocks held now,
    `admission` what was found of the prompt the first time. `prompt` contains the facts for the decision at its last admission, at
    `admitted_ms`; None if everything was resident. `attend` says whether its first blocks may stay in the store. `drafts` are
    drafts of the next tokens. A FAILED sequence has its `error`.
    """

    sequence_id: int
    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    submitted_ms: float
    priority: int = 0
    extra_keys: tuple[bytes, ...] = ()
    text_stream: TextStream | None = None
    sampler: Sampler = field(init=False)
    hashes: list[BlockHash] = field(default_factory=list)
    admission: Admission | None = None
    prompt: Prompt | None = None
    admitted_ms: float = 0.0
    table: BlockTable | None = None
    load: Load | None = None
    attend: AttendState = field(default_factory=AttendState)
    drafts: tuple[int, ...] = ()
    computed_tokens: int = 0
    computable_tokens: int | None = None
    blocks_used: int = 0
    preemptions: int = 0
    first_token_ms: float | None = None
    finished_ms: float | None = None
    finish_reason: FinishReason | None = None
    error: AttnStoreError | None = None

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling)

    @property
    def generated(self) -> list[int]:
        """The tokens sampled so far."""
        return self.token_ids[self.prompt_tokens :]

    def room_tokens(self, chunk_tokens: int) -> int:
        """The number of tokens for which the next step needs blocks: all known ones, or those of the next chunk if the sequence
        attends.
        """
        known = next_chunk(self, chunk_tokens).end if self.attend.attends else len(self.token_ids)
        return known + len(self.drafts)

    @property
    def in_prefill(self) -> bool:
        """True if tokens of the prompt are still to be computed."""
        return self.computed_tokens < self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[begin, end)` of a sequence, to be computed in one step, and drafts of the tokens after them."""

    sequence: Sequence
    begin: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of tokens that the chunk computes."""
        return self.end - self.begin + len(self.drafts)

    def token_ids(self) -> list[int]:
        """The tokens that the chunk computes."""
        return [*self.sequence.token_ids[self.begin : self.end], *self.drafts]

    @property
    def gives_token(self) -> bool:
        """True if the chunk ends with the last known token, so that its logits give the next one."""
        return self.end == len(self.sequence.token_ids)


def next_chunk(sequence: Sequence, chunk_tokens: int) -> Chunk:
    """Returns the next tokens to compute, before pages in flight; possibly none."""
    chunk = chunk_at(sequence, sequence.computed_tokens, chunk_tokens)
    if sequence.computable_tokens is None:
        return replace(chunk, drafts=sequence.drafts) if chunk.gives_token else chunk
    return Chunk(sequence, chunk.begin, max(chunk.begin, min(chunk.end, sequence.computable_tokens)))


def chunk_at(sequence: Sequence, begin: int, chunk_tokens: int) -> Chunk:
    """Returns the tokens from `begin` up to the next absolute multiple of `chunk_tokens`.

    Absolute boundaries make the steps after a hit the same as those of a run without it, except the first one.
    """
    boundary = (begin // chunk_tokens + 1) * chunk_tokens
    return Chunk(sequence, begin, min(boundary, len(sequence.token_ids)))
