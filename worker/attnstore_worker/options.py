"""The options of an engine and of sampling, and their choices.

Owns: `EngineOptions`, the limits of the scheduler in them, the choices by name and the largest values. Invariants: options that
exist are consistent; inconsistent values are refused before anything is allocated. Imports no engine, so that the command checks
its options before it loads one.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Final

from attnstore.errors import InvalidArgument
from attnstore.limits import MIB
from attnstore.secrecy import shown

WRITE_POLICIES: Final = ("write-behind", "write-through", "on-evict")
"""See `attnstore_worker.cache.moving.writers`."""
DEVICES: Final = "cpu, cuda, cuda:N or auto"
SEED_MAX: Final = (1 << 63) - 1
TEMPERATURE_MAX: Final = 100.0


_DEVICE: Final = re.compile(r"cpu|cuda(?::[0-9]{1,3})?|auto|simulated")


def device_name(text: str) -> str:
    """Returns the name of a device, unchanged. Raises `InvalidArgument` for a text that names none."""
    if not _DEVICE.fullmatch(text):
        raise InvalidArgument(f"{shown(text)} is not {DEVICES}")
    return text


class SharedUse(enum.Enum):
    """How pages in a store node on this host are used: copied from its memory, or in place."""

    COPY = "copy"
    IN_PLACE = "in-place"


class AttendPolicy(enum.StrEnum):
    """Which sequences attend to blocks in the store. BEYOND_POOL: those that do not fit into the pool. MEASURED: also those for
    which measured costs say so. ALWAYS: all that find blocks there.
    """

    NEVER = "never"
    BEYOND_POOL = "beyond_pool"
    MEASURED = "measured"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`sequences_max` run at once and `waiting_max` wait; a step computes at most `step_tokens` tokens, at most `chunk_tokens` of
    one sequence.

    Raises `InvalidArgument` for values that could keep a prompt waiting forever.
    """

    chunk_tokens: int
    step_tokens: int
    sequences_max: int
    waiting_max: int

    def __post_init__(self) -> None:
        if self.sequences_max < 1 or self.waiting_max < 1:
            raise InvalidArgument(
                f"sequences_max is {self.sequences_max} and waiting_max {self.waiting_max}; both must be at least 1"
            )
        needed = self.chunk_tokens + self.sequences_max - 1
        if self.step_tokens < needed:
            raise InvalidArgument(
                f"step_tokens is {self.step_tokens}; {needed} are needed for a chunk of {self.chunk_tokens} tokens "
                f"beside {self.sequences_max - 1} decodes"
            )


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`pool_bytes` is a hard limit on KV memory, `host_pool_bytes` on the HOST tier below it (0: none). Every store call has the
    deadline `store_deadline_ms`. Pages are shared only with workers of the same `tenant_salt`. `eviction` is one of
    `EVICTION_POLICIES`, `write_policy` one of `WRITE_POLICIES`; `shared` says how pages of a node on this host are used.

    At most `chunk_tokens` of one prompt and `step_tokens` of all sequences run in one step (None: two chunks and all decodes).
    `sequences_max` run at once and `waiting_max` wait; the first `prefetch_sequences` of the waiting ones have pages prefetched.
    `attend` says which sequences leave blocks in the store and attend to them there. With `speculate`, next tokens are drafted and
    several are verified at a time; the tokens are the same.
    Raises `InvalidArgument` for inconsistent values (for an unknown policy when the engine is created).
    """

    pool_bytes: int = 512 * MIB
    block_tokens: int = 16
    chunk_tokens: int = 512
    step_tokens: int | None = None
    sequences_max: int = 64
    waiting_max: int = 1024
    store_deadline_ms: int = 5_000
    tenant_salt: bytes = field(default=b"", repr=False)
    eviction: str = "lru"
    write_policy: str = "write-behind"
    prefetch_sequences: int = 2
    host_pool_bytes: int = 0
    shared: SharedUse = SharedUse.COPY
    attend: AttendPolicy = AttendPolicy.NEVER
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.chunk_tokens % self.block_tokens:
            raise InvalidArgument(
                f"chunk_tokens is {self.chunk_tokens}; it must be a positive multiple of block_tokens = {self.block_tokens}"
            )
        if self.prefetch_sequences < 0:
            raise InvalidArgument(f"prefetch_sequences is {self.prefetch_sequences}; it must not be negative")
        if self.store_deadline_ms < 1:
            raise InvalidArgument(f"store_deadline_ms is {self.store_deadline_ms}; it must be at least 1")
        if not isinstance(self.attend, AttendPolicy):
            raise InvalidArgument(f"attend is {self.attend!r}; it must be an AttendPolicy, one of {', '.join(AttendPolicy)}")
        self.scheduler_limits()

    def scheduler_limits(self) -> SchedulerLimits:
        """The limits of the scheduler."""
        step_tokens = 2 * self.chunk_tokens + self.sequences_max if self.step_tokens is None else self.step_tokens
        return SchedulerLimits(self.chunk_tokens, step_tokens, self.sequences_max, self.waiting_max)
