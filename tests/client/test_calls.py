"""A call on another thread's event loop, interrupted at every instruction of the waiting thread in turn."""

from __future__ import annotations

import asyncio
import concurrent.futures
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from attnstore.client.calls import run_on

WAIT_S = 20

INTERRUPTED_AT_EVERY_INSTRUCTION = """
import asyncio, sys, threading
from attnstore.client import calls

class Interrupt(BaseException):
    pass

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()

async def work(state):
    state.append("began")
    try:
        await asyncio.sleep(0.001)
        state.append("worked")
        return 7
    finally:
        state.append("ended")

def interrupted_at(number):
    # Runs a call. Raises at its instruction with this number; returns False if it has fewer.
    left, frames = number, 0
    def trace(frame, event, _):
        nonlocal left
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace
    state, interrupted = [], False
    coroutine = work(state)
    sys.settrace(trace)
    try:
        assert calls.run_on(loop, coroutine) == 7
    except Interrupt:
        interrupted = True
    finally:
        sys.settrace(None)
    at_end = list(state)
    coroutine.close()
    assert at_end[-1:] == ["ended"] * bool(at_end), f"instruction {number}: the call ended and its coroutine goes on: {at_end}"
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    assert state == at_end, f"instruction {number}: {state[len(at_end):]} after the call had ended"
    return interrupted

number = 1
while interrupted_at(number):
    number += 1
print(number)
"""


def test_an_interrupt_at_any_instruction_ends_the_coroutine_before_the_call() -> None:
    """The interrupt of a signal can come between any two instructions of the main thread."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", INTERRUPTED_AT_EVERY_INSTRUCTION],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) > 20, "instructions of one call"


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_call_returns_what_its_coroutine_returns_or_raises(loop: asyncio.AbstractEventLoop) -> None:
    async def broken() -> None:
        raise OSError("no such page")

    assert run_on(loop, asyncio.sleep(0, 7)) == 7
    with pytest.raises(OSError, match="no such page"):
        run_on(loop, broken())


def test_a_call_whose_task_is_cancelled_by_others_raises(loop: asyncio.AbstractEventLoop) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        run_on(loop, cancelled())


def test_a_call_on_a_closed_loop_raises(loop: asyncio.AbstractEventLoop) -> None:
    closed = asyncio.new_event_loop()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        run_on(closed, asyncio.sleep(0))
    assert run_on(loop, asyncio.sleep(0, 7)) == 7
