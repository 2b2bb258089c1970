"""What the worker refuses, as leaves of AttnStore's one exception tree.

    Retryable
    └── PagesLost                     pages that a running step waits for did not come; the engine computes them instead
    NotRetryable
    └── InvalidArgument
        ├── ModelUnavailable          the model's files are missing, damaged or of a kind the worker cannot run
        ├── ContextOverflow           the prompt leaves no room in the model's context
        └── PoolTooSmall              the sequence, or even one page, does not fit into the block pool

Nothing a store does reaches a caller: a store that fails costs hits, never an error. `PagesLost` stays inside the engine.
"""

from __future__ import annotations

from attnstore.errors import InvalidArgument, Retryable


class PagesLost(Retryable):
    """Pages that a running step waits for did not come; the engine computes them instead."""

    code = "pages_lost"


class ModelUnavailable(InvalidArgument):
    """The model's files are missing, damaged or of a kind the worker cannot run."""

    code = "model_unavailable"


class ContextOverflow(InvalidArgument):
    """The prompt leaves no room in the model's context."""

    code = "context_overflow"


class PoolTooSmall(InvalidArgument):
    """A sequence, or even one page, does not fit into the block pool."""

    code = "pool_too_small"
