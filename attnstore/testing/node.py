"""A real store node in a process of its own, for tests, experiments and doctests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_READY = "listening on "
_START_S_MAX = 120.0
"""A node that attends compiles its kernels first unless they are cached: half a minute on a busy machine."""
_STOP_S_MAX = 30.0


class StoreProcess:
    """`attnstore serve` with the given options, on a free loopback port unless they name one; a context manager. It does not attend
    unless `--attend-threads` is given, because a node that attends loads torch first.

    `under` is a command that runs it, with its arguments. `url` is for `attnstore.connect`. Raises `RuntimeError` with the node's
    log if it does not start.
    """

    def __init__(self, *options: str, environment: dict[str, str] | None = None, under: Sequence[str] = ()) -> None:
        listen = () if "--listen" in options else ("--listen", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "attnstore.cli", "serve", *listen, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"ATTNSTORE_ATTEND_THREADS": "0", **os.environ, **(environment or {})},
        )
        # Drains the log all the time, because a full pipe would block the node.
        self._log: list[str] = []
        self._drain = threading.Thread(target=self._read_log, daemon=True)
        self._drain.start()
        self.address = self._wait_until_ready()
        self.url = f"grpc://{self.address}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """The log of the node so far."""
        return "".join(self._log)

    def stop(self) -> int:
        """Sends SIGTERM and waits for the drain. Returns the exit status. Kills the node if it does not end in time."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Sends SIGKILL: the node ends without cleanup."""
        return self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Sends SIGSTOP and waits until every thread of the node has stopped, because until then one may still answer. `resume`
        ends it.
        """
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Sends SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            status = self.process.wait(_STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._drain.join(_STOP_S_MAX)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return status

    def _wait_until_ready(self) -> str:
        assert self.process.stdout is not None
        killer = threading.Timer(_START_S_MAX, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        killer.join()
        if not line.startswith(_READY):
            self._end(signal.SIGKILL)
            raise RuntimeError(f"the store node did not start:\n{self.log}")
        return line.removeprefix(_READY).strip()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self._log.extend(self.process.stderr)
