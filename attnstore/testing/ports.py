"""A port for a server that must be told one before it starts."""

from __future__ import annotations

from contextlib import ExitStack

from attnstore.address import Address


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens on now. Somebody may, a moment later."""
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(listener) for listener in Address.of(host, 0).listen()]
        return int(first.getsockname()[1])
