"""The errors of the worker, as leaves of AttnStore's one exception tree.

    Retryable
    ├── PagesLost                     pages that a running step needs did not arrive; the engine computes them instead
    ├── StepFailed                    the step that computed this sequence and others failed
    └── OutOfDeviceMemory             the device has too little free memory for a pool or a step
    NotRetryable
    ├── DeviceLost                    the device does no work any more; the worker must be started again
    ├── SequenceFailed                only this sequence failed: sampling, its text, its blocks
    │   └── LogitsNotFinite           the model returned logits that are not finite
    └── InvalidArgument
        ├── ModelUnavailable          the model's files are missing, damaged or of a kind that the worker cannot run
        ├── ContextOverflow           the prompt leaves no room in the model's context
        ├── PoolTooSmall              the sequence, or even one page, does not fit into the block pool
        └── DeviceUnavailable         the named device is not there, or this installation cannot use it

Errors of a store do not reach a caller: a store that fails costs hits, never an error. `PagesLost` stays inside the engine. An
error of one sequence ends no other sequence (docs/decisions/0063-a-fault-ends-what-it-concerns.md).
"""

from __future__ import annotations

from attnstore.errors import InvalidArgument, NotRetryable, Retryable


class PagesLost(Retryable):
    """Pages that a running step needs did not arrive; the engine computes them instead."""

    code = "pages_lost"


class StepFailed(Retryable):
    """The step that computed this sequence and others failed: the model raised, or memory ran out."""

    code = "step_failed"


class OutOfDeviceMemory(Retryable):
    """The device has too little free memory for a pool or a step."""

    code = "out_of_device_memory"


class DeviceLost(NotRetryable):
    """The device does no work any more: its driver reported an error that ends all work of the process on it."""

    code = "device_lost"


class SequenceFailed(NotRetryable):
    """Only this sequence failed; others are not affected."""

    code = "sequence_failed"


class LogitsNotFinite(SequenceFailed):
    """The model returned logits that are not finite."""

    code = "logits_not_finite"


class ModelUnavailable(InvalidArgument):
    """The model's files are missing, damaged or of a kind that the worker cannot run."""

    code = "model_unavailable"


class ContextOverflow(InvalidArgument):
    """The prompt leaves no room in the model's context."""

    code = "context_overflow"


class PoolTooSmall(InvalidArgument):
    """A sequence, or even one page, does not fit into the block pool."""

    code = "pool_too_small"


class DeviceUnavailable(InvalidArgument):
    """The named device is not there, or this installation cannot use it."""

    code = "device_unavailable"
