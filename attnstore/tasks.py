"""The end of a background task.

Owns: `end`. Why not `cancel()` and `await` with the cancellation suppressed: that suppresses a cancellation of the caller as well,
who then goes on for ever; and a library inside the task may swallow the one that was meant for it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

_AGAIN_S: Final = 0.5


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task, again as often as that takes, and waits for its end. Raises what it met other than that."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_S)
    if not task.cancelled():
        task.result()
