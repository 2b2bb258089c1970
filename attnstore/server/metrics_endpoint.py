"""The Prometheus endpoint of a node: `GET /metrics` on every socket that it is given.

Owns: its listening sockets and threads, until `stop`. Exists because `prometheus_client` binds only one address of a host.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app


class MetricsEndpoint:
    """Serves the registry on `listeners`, which it owns from now on."""

    def __init__(self, registry: CollectorRegistry, listeners: Sequence[socket.socket]) -> None:
        app = make_wsgi_app(registry)
        self._servers = [_Server(listener, app) for listener in listeners]
        self._threads = [threading.Thread(target=server.serve_forever, name="metrics", daemon=True) for server in self._servers]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Takes no request any more."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingWSGIServer):
    """On a socket that listens already."""

    def __init__(self, listener: socket.socket, app: Any) -> None:
        super().__init__(listener.getsockname(), _SilentHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        # Its own way of binding would ask the resolver for this machine's name.
        self.server_name, self.server_port = listener.getsockname()[:2]
        self.setup_environ()
        self.set_app(app)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""
