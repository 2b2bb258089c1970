"""The walk of a page in docs/architecture.md is the one that a read takes."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from attnstore.testing import StoreProcess
from attnstore_worker.cache import open_store
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel

ROOT = Path(__file__).parents[3]
CALLS_MAX = 8
"""From `CacheManager.admit` to the socket, and on the stack of the load's thread."""


class Stacks:
    """The stacks in which the engine's thread starts another one, and in which any thread receives a page."""

    def __init__(self) -> None:
        self.starts: set[tuple[str, ...]] = set()
        self.receives: set[tuple[str, ...]] = set()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__name__ == "start_new_thread":
            self.starts.add(_calls(frame))
        if event == "c_call" and argument.__name__ == "recvmsg_into":
            self.receives.add(_calls(frame))


def _calls(frame: FrameType | None) -> tuple[str, ...]:
    calls: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            calls.append(f"{frame.f_code.co_qualname} {path.relative_to(ROOT)}")
        frame = frame.f_back
    return tuple(reversed(calls))


def _is_walked(walk: list[str], calls: tuple[str, ...]) -> bool:
    """Whether the walk's calls are among `calls`, in their order."""
    rest = iter(calls)
    return all(call in rest for call in walk)


def test_the_walk_of_a_page_in_the_documentation_is_the_one_that_a_read_takes(tiny: LoadedModel) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walk = [f"{call} {path}" for call, path in re.findall(r"^\| \d \| `([\w.]+)` \| `([\w./]+)` \|", page, flags=re.MULTILINE)]
    assert 1 < len(walk) <= 1 + CALLS_MAX
    prompts = [[first + index % 50 for index in range(4 * 16 + 5)] for first in (3, 103)]
    options = EngineOptions(pool_bytes=64 << 20)
    stacks = Stacks()
    with StoreProcess("--capacity", "64MiB") as node:
        for reads in (False, True):
            with open_store(node.url, deadline_ms=30_000, transport="tcp") as store, Engine(tiny, options, store=store) as engine:
                for prompt in prompts:  # the first one opens the connection
                    sequence = engine.submit(prompt, SamplingParams(max_tokens=1))
                    if reads and prompt is prompts[-1]:
                        threading.setprofile(stacks.profile)
                        sys.setprofile(stacks.profile)
                    while sequence.finish_reason is None:
                        engine.step()
                sys.setprofile(None)
                threading.setprofile(None)
                assert engine.flush(30_000)
    assert min(map(len, stacks.receives)) <= CALLS_MAX, stacks.receives
    taken = [start + receive for start in stacks.starts for receive in stacks.receives]
    assert any(_is_walked(walk, calls) for calls in taken), f"no read takes this walk, but {taken}"
