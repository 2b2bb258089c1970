"""A port for a server that must be told one before it starts."""

from __future__ import annotations

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens on now. Somebody may, a moment later."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])
