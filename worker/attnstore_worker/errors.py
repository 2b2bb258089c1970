"""What the worker refuses, as leaves of AttnStore's one exception tree.

    Retryable
    ├── PagesLost                     pages that a running step waits for did not come; the engine computes them instead
    └── StepFailed                    the step failed that computed this sequence and others
    NotRetryable
    ├── SequenceFailed                something of this sequence alone failed: sampling, its text, its blocks
    │   └── LogitsNotFinite           the model gave the sequence no numbers to draw a token from
    └── InvalidArgument
        ├── ModelUnavailable          the model's files are missing, damaged or of a kind the worker cannot run
        ├── ContextOverflow           the prompt leaves no room in the model's context
        └── PoolTooSmall              the sequence, or even one page, does not fit into the block pool

Nothing a store does reaches a caller: a store that fails costs hits, never an error. `PagesLost` stays inside the engine. What ends
one sequence ends no other (docs/decisions/0063-a-fault-ends-what-it-concerns.md).
"""

from __future__ import annotations

from attnstore.errors import InvalidArgument, NotRetryable, Retryable


class PagesLost(Retryable):
    """Pages that a running step waits for did not come; the engine computes them instead."""

    code = "pages_lost"


class StepFailed(Retryable):
    """The step failed that computed this sequence and others: the model raised, or memory ran out."""

    code = "step_failed"


class SequenceFailed(NotRetryable):
    """Something of this sequence alone failed. Others are not concerned."""

    code = "sequence_failed"


class LogitsNotFinite(SequenceFailed):
    """The model gave the sequence no numbers to draw a token from."""

    code = "logits_not_finite"


class ModelUnavailable(InvalidArgument):
    """The model's files are missing, damaged or of a kind the worker cannot run."""

    code = "model_unavailable"


class ContextOverflow(InvalidArgument):
    """The prompt leaves no room in the model's context."""

    code = "context_overflow"


class PoolTooSmall(InvalidArgument):
    """A sequence, or even one page, does not fit into the block pool."""

    code = "pool_too_small"
