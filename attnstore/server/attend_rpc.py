"""The Attend stream over gRPC: one step after the other, each computed on a thread while the event loop serves other calls.

Invariant: the session is closed only when no thread uses it any more, however the call ends.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from attnstore.errors import Unsupported
from attnstore.limits import CHANNEL_IDLE_MS_MAX
from attnstore.server.attend import Attending, AttendSession
from attnstore.server.attend_channel import NOT_OFFERED
from attnstore.telemetry import NodeMetrics
from attnstore.wire.attend import AttendOpen, AttendQuery, AttendStep, opened_to_wire, partial_to_wire, step_from_wire
from attnstore.wire.messages import ATTENDING, METHODS

_decode = METHODS["Attend"].decode_request


async def attend(attending: Attending | None, metrics: NodeMetrics, context: Any, tenant: str, stall_s: float) -> None:
    """Serves one call until the client has no more steps.

    Raises the typed error of the first refused step. Raises `TimeoutError` for a client that sends no step for
    `CHANNEL_IDLE_MS_MAX` or does not take an answer within `stall_s`.
    """
    if attending is None:
        raise Unsupported(NOT_OFFERED)
    session = attending.session(tenant)
    answering: asyncio.Future[Any] | None = None
    try:
        await context.send_initial_metadata((ATTENDING,))
        while True:
            async with asyncio.timeout(CHANNEL_IDLE_MS_MAX / 1000):
                message = await context.read()
            if message is grpc.aio.EOF:
                return
            step = step_from_wire(_decode(message))
            # A future, not a coroutine: cancelling the call must not abandon a thread that uses the session.
            answering = asyncio.get_running_loop().run_in_executor(attending.executor, _answer, session, step)
            answer = await asyncio.shield(answering)
            if answer is not None:
                async with asyncio.timeout(stall_s):
                    await context.write(answer)
            if isinstance(step, AttendQuery):
                metrics.attended("grpc", step.total_rows)
    finally:
        # Closing large sets takes long, so it does not run on the event loop.
        if answering is None or answering.done():
            attending.executor.submit(session.close)
        else:
            answering.add_done_callback(lambda _: attending.executor.submit(session.close))


def _answer(session: AttendSession, step: AttendStep) -> Any:
    if isinstance(step, AttendOpen):
        session.open(step)
        return opened_to_wire(step.set_id)
    if isinstance(step, AttendQuery):
        return partial_to_wire(*session.answer(step))
    session.close_set(step)
    return None
