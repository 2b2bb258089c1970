"""LMCache beside vLLM: its server on a CPU, and vLLM's configuration for it.

Owns: the server's process. Written against LMCache 0.5.6: its connector inside vLLM's own process does not support CPUs, but its
server does if it lets the engine do the transfers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from attnstore.testing.ports import free_port
from experiments.bandwidth.processes import ChildEnded, listens

_HOST: Final = "127.0.0.1"
_CAPACITY_GB: Final = 4
_START_S_MAX: Final = 120.0


@contextmanager
def lmcache_server(python: Path, log: IO[str]) -> Iterator[dict[str, Any]]:
    """Runs a server of LMCache in the environment of `python` for the block. Yields vLLM's `kv_transfer_config` for it.

    Raises `ChildEnded` if it does not start.
    """
    port, http_port = free_port(), free_port()
    options = {
        "--host": _HOST,
        "--port": port,
        "--http-port": http_port,
        "--l1-size-gb": _CAPACITY_GB,
        "--eviction-policy": "LRU",
        "--supported-transfer-mode": "engine_driven",
    }
    command = [str(python.parent / "lmcache"), "server", "--disable-observability"]
    command += [str(word) for option in options.items() for word in option]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        # HTTP is the last service that it starts.
        if not listens(process, http_port, _START_S_MAX):
            raise ChildEnded(" ".join(command))
        yield {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": f"tcp://{_HOST}", "lmcache.mp.port": port},
        }
    finally:
        process.terminate()
        process.wait()
