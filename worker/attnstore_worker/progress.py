"""The progress display on a terminal; silent elsewhere.

Owns: `Progress` and its two implementations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from attnstore_worker.engine import Sequence


class Progress(AbstractContextManager["Progress"], Protocol):
    """Receives events and shows them while it is entered."""

    def phase(self, name: str) -> None:
        """Starts a phase of unknown length."""
        ...

    def tokens(self, sequence: Sequence) -> None:
        """Reports that the sequence has advanced."""
        ...


def create_progress(stream: TextIO) -> Progress:
    """Returns a display if `stream` is a terminal, else a silent one."""
    return _TerminalProgress(stream) if stream.isatty() else _Silence()


class _Silence:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def phase(self, name: str) -> None:
        """No-op."""

    def tokens(self, sequence: Sequence) -> None:
        """No-op."""


class _TerminalProgress:
    """One line that is replaced during the work and removed at the end."""

    def __init__(self, stream: TextIO) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._display = RichProgress(*columns, console=Console(file=stream), transient=True)
        self._task: TaskID = self._display.add_task("", total=None)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.stop()

    def phase(self, name: str) -> None:
        self._display.reset(self._task, description=name, total=None)

    def tokens(self, sequence: Sequence) -> None:
        if sequence.in_prefill:
            done, total, name = sequence.computed_tokens, sequence.prompt_tokens, "prompt tokens"
        else:
            done, total, name = len(sequence.generated), sequence.sampling.max_tokens, "new tokens"
        self._display.update(self._task, description=name, completed=done, total=total)
