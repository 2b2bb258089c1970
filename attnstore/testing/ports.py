"""A port for a server that needs its port before it starts."""

from __future__ import annotations

from contextlib import ExitStack

from attnstore.address import Address


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port of `host` that is free now. Another process may take it a moment later."""
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(listener) for listener in Address.of(host, 0).listen()]
        return int(first.getsockname()[1])
