"""The endpoint as a process serves it: a socket, the application on it, and an end in order.

Owns: the listening socket. Invariant: the address is printed only once connections are taken.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, suppress
from typing import Final

import uvicorn

from attnstore.address import Address
from attnstore.errors import InvalidArgument
from worker.engine import AsyncEngine, Engine
from worker.serve.app import create_app

_DRAIN_S: Final = 10
"""After a signal, answers under way have this long to finish."""


def serve(engine: Engine, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM, on the main thread; port 0 takes a free one.

    Raises `InvalidArgument` for an address that cannot be had.
    """
    try:
        address = Address.of(host, port)
    except InvalidArgument as error:
        raise InvalidArgument(f"--host {host} --port {port}: {error}") from None
    try:
        listeners = address.listen()
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {address}: {error}") from None
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        front = stack.enter_context(AsyncEngine(engine))
        config = uvicorn.Config(
            create_app(front, engine.model), log_level="warning", access_log=False, timeout_graceful_shutdown=_DRAIN_S
        )
        url = f"http://{address.at(listeners[0].getsockname()[1])}"
        print(f"attnstore-worker: serving {engine.model.name} on {url}", file=sys.stderr, flush=True)
        # uvicorn raises the signal once more when it is done: as an exception, so that the engine is closed in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=list(listeners))
