"""Where compiled threads wait for each other, and how they divide work.

Owns: `meet` and `take`. Invariant: what a thread wrote before it, every thread reads after it. The threads that meet are started
for one call and run nothing between that can fail; one that is late is waited for without burning its core: the waiting thread
gives it away.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from attnstore.copying.compiled import compiled

SPOILT: Final = 1 << 40
"""More than any counter counts to."""

_SPINS: Final = 2000
"""Looks before the core is given away, some microseconds: phases of one layer end closer together than the system can switch."""

_give_core_away = types.ExternalFunction("sched_yield", types.int32())


def _counter(context, builder, signature, args):
    return context.make_array(signature.args[0])(context, builder, args[0]).data


@intrinsic
def take(typingctx, counter):
    """Adds 1 to `counter[0]`, int64; returns what it was: each number to one thread."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _counter(context, builder, signature, args), ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(counter), codegen


@intrinsic
def _arrived(typingctx, counter):
    """`counter[0]` as the other threads see it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_counter(context, builder, signature, args), "acquire", 8)

    return types.int64(counter), codegen


@compiled
def meet(counter, threads):
    """Returns when all of `threads` threads have called it as often as this one. counter: int64 `[1]`, 0 before the first time.

    From SPOILT on nobody waits at it.
    """
    awaited = min((take(counter) // threads + 1) * threads, SPOILT)
    looks = 0
    while _arrived(counter) < awaited:
        looks += 1
        if looks > _SPINS:
            _give_core_away()
