"""Child processes of a run: started together, controlled over a pipe, always ended.

Owns: every process of a run. Invariant: a child ends when its standard input is closed, so none outlives the run even if the run is
killed. Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from attnstore.address import Address

ROOT = Path(__file__).parents[2]
_START_S_MAX = 60.0
_END_S_MAX = 10.0
_LISTENS_POLL_S = 0.05


class ChildEnded(Exception):
    """A child ended when an answer was due; its output is on the terminal."""


class Child:
    """A command with pipes that prints one line when it is ready and ends when its input does."""

    def __init__(
        self, command: Sequence[str], stderr: int | IO[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = " ".join(command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            stderr=stderr,
            env=environment,
            process_group=0,
        )

    @classmethod
    def of_module(cls, name: str, argument: str) -> Child:
        """`python -m NAME ARGUMENT` under this interpreter."""
        return cls([sys.executable, "-m", name, argument])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def first_line(self, limit_s: float = _START_S_MAX) -> str:
        """Returns the line that the child prints when it is ready. Raises `ChildEnded` if it ends or takes too long."""
        return self._within(limit_s, self.answer)

    def ask_within(self, limit_s: float, line: str) -> str:
        """Sends one line and returns the answer. Raises `ChildEnded` if the child ends or takes too long."""
        return self._within(limit_s, lambda: self.ask(line))

    def ask(self, line: str) -> str:
        """Sends one line and returns the answer. Raises `ChildEnded`."""
        self.tell(line)
        return self.answer()

    def tell(self, line: str) -> None:
        """Sends one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Returns the next line of the child's output. Raises `ChildEnded`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildEnded(self._command)
        return line.rstrip("\n")

    def _within(self, limit_s: float, wait: Callable[[], str]) -> str:
        killer = threading.Timer(limit_s, self._kill)
        killer.start()
        try:
            return wait()
        finally:
            killer.cancel()

    def stop(self) -> None:
        """Closes the child's input, which ends it; kills it if that does not help."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        self.process.stdout.close()

    def _kill(self) -> None:
        """Kills the child and the processes that it has started: vLLM's engine outlives its parent."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def listens(process: subprocess.Popen[bytes], port: int, limit_s: float) -> bool:
    """Waits until `port` of this host is open. Returns whether it is, before the process ends and within the limit."""
    until = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(_LISTENS_POLL_S)
    return False


def serve_connections(host: str, answer: Callable[[socket.socket], None]) -> str:
    """Listens on a free port of `host` and runs `answer` on a thread for each connection. Returns the address."""
    listeners = Address.of(host, 0).listen()

    def accept(listener: socket.socket) -> None:
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    for listener in listeners:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    return str(Address.of(host, listeners[0].getsockname()[1]))


def say_and_wait(line: str) -> None:
    """Prints a child's first line and waits until the parent ends it."""
    print(line, flush=True)
    sys.stdin.read()
