"""The endpoint's process: its sockets, the application on them, and an orderly shutdown.

Owns: the listening sockets. Invariants: the address is printed only once connections are accepted; other machines are not served
without a token, unless the operator allows it; a process whose engine has failed exits, so that its supervisor starts another.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import uvicorn
from starlette.applications import Starlette

from attnstore.address import Address
from attnstore.config import read_tokens_file
from attnstore.errors import InvalidArgument, Unavailable
from attnstore.limits import HTTP_IDLE_MS_MAX
from attnstore.tokens import is_token
from attnstore_worker.engine import AsyncEngine, Engine
from attnstore_worker.serve.app import create_app
from attnstore_worker.serve.connection import BoundedProtocol
from attnstore_worker.serve.guard import ANYONE

_DRAIN_S: Final = 10
"""The time for running answers to finish after a signal."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the endpoint listens (port 0 takes a free one), and the tokens (token -> caller) of its callers.

    Without tokens everyone who reaches it is a caller. `priority_callers` may give a request a priority.
    """

    address: Address
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    priority_callers: frozenset[str] = frozenset()

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        *,
        token: str | None,
        tokens_file: Path | None,
        insecure: bool,
        allow_priority: Sequence[str] = (),
    ) -> Self:
        """Creates an endpoint from the options of these names. Raises `InvalidArgument`, also for a public address
        without a token.
        """
        try:
            address = Address.of(host, port)
        except InvalidArgument as error:
            raise InvalidArgument(f"--host {host} --port {port}: {error}") from None
        if token is not None and tokens_file is not None:
            raise InvalidArgument("--token and --tokens-file exclude each other")
        if token is not None and not is_token(token):
            raise InvalidArgument("--token must be printable ASCII without spaces")
        tokens = {token: ANYONE} if token is not None else {}
        if tokens_file is not None:
            tokens = read_tokens_file(tokens_file)
        if not (tokens or insecure or address.is_loopback):
            raise InvalidArgument(
                f"--host {host} is reachable from other machines: give --token or --tokens-file, "
                "or say --insecure to serve everyone who can reach it"
            )
        callers = set(tokens.values()) or {ANYONE}
        if strangers := sorted(set(allow_priority) - callers):
            known = ", ".join(sorted(callers))
            raise InvalidArgument(f"--allow-priority {strangers[0]}: no caller has that name; there is {known}")
        return cls(address, tokens, frozenset(allow_priority))


def server_config(app: Starlette) -> uvicorn.Config:
    """Returns uvicorn's configuration."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=HTTP_IDLE_MS_MAX // 1000,
        timeout_graceful_shutdown=_DRAIN_S,
    )


def serve(engine: Engine, endpoint: Endpoint) -> None:
    """Serves until SIGINT or SIGTERM, on the main thread. Raises `InvalidArgument` for an address that cannot be bound,
    `Unavailable` if the engine fails.
    """
    try:
        listeners = endpoint.address.listen()
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {endpoint.address}: {error}") from None
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        front = stack.enter_context(AsyncEngine(engine))
        config = server_config(create_app(front, engine.model, endpoint.tokens, endpoint.priority_callers))
        url = f"http://{endpoint.address.at(listeners[0].getsockname()[1])}"
        print(f"attnstore-worker: serving {engine.model.name} on {url}", file=sys.stderr, flush=True)
        # uvicorn raises the signal again when it is done: as an exception, so that the engine is closed properly.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            _Server(config, front).run(sockets=list(listeners))
        if not front.alive:
            raise Unavailable("the engine failed and cannot compute any more")


class _Server(uvicorn.Server):
    """Shuts down once `front` accepts no more prompts."""

    def __init__(self, config: uvicorn.Config, front: AsyncEngine) -> None:
        super().__init__(config)
        self._front = front

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns True when it is time to end."""
        return await super().on_tick(counter) or not self._front.alive
