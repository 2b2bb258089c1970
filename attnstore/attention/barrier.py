"""A barrier and a work counter for compiled threads.

Owns: `meet` and `take`. Invariant: what a thread wrote before a meeting, every thread reads after it. The threads are started for
one call and run nothing in between that can fail. A thread that waits for a late one yields its core instead of spinning.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from attnstore.copying.compiled import compiled

SPOILT: Final = 1 << 40
"""Greater than any value of a counter."""

_SPINS: Final = 2000
"""Polls before the core is yielded, some microseconds: the phases of one layer end closer together than the system can switch
threads.
"""

_give_core_away = types.ExternalFunction("sched_yield", types.int32())


def _counter(context, builder, signature, args):
    return context.make_array(signature.args[0])(context, builder, args[0]).data


@intrinsic
def take(typingctx, counter):
    """Adds 1 to `counter[0]`, int64, and returns its previous value: each number goes to one thread."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _counter(context, builder, signature, args), ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(counter), codegen


@intrinsic
def _arrived(typingctx, counter):
    """Returns `counter[0]` as the other threads see it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_counter(context, builder, signature, args), "acquire", 8)

    return types.int64(counter), codegen


@compiled
def meet(counter, threads):
    """Returns when all of `threads` threads have called it as often as this one. counter: int64 `[1]`, 0 before the first call.

    From SPOILT on, no thread waits.
    """
    awaited = min((take(counter) // threads + 1) * threads, SPOILT)
    looks = 0
    while _arrived(counter) < awaited:
        looks += 1
        if looks > _SPINS:
            _give_core_away()
