"""A server that answers any request to a node and records what it receives: tokens, pages, requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from attnstore.wire.messages import METHODS, SERVICE


class RogueNode:
    """Listens on loopback; with `certificates` over TLS, with the same key as the nodes."""

    def __init__(self, certificates: Path | None = None) -> None:
        self._lock = threading.Lock()
        self.asked: list[str] = []
        self.credentials: list[str] = []
        self.page_bytes = 0
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((_Everything(self),))
        if certificates is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (certificates / "key.pem").read_bytes(), (certificates / "cert.pem").read_bytes()
            port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        self.url = f"{'grpc' if certificates is None else 'grpcs'}://127.0.0.1:{port}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.stop(0)

    def note(self, method: str, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        with self._lock:
            self.asked.append(method)
            self.credentials += [str(value) for name, value in metadata if name == "authorization"]

    def took(self, size_bytes: int) -> None:
        with self._lock:
            self.page_bytes += size_bytes


class _Everything(grpc.GenericRpcHandler):
    def __init__(self, rogue: RogueNode) -> None:
        self._rogue = rogue

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        if not details.method.startswith(f"/{SERVICE}/"):
            return None
        self._rogue.note(name, tuple(details.invocation_metadata or ()))
        method = METHODS[name]
        if method.streams_requests:
            return grpc.stream_unary_rpc_method_handler(self._take)
        return grpc.unary_unary_rpc_method_handler(_empty)

    def _take(self, requests: Iterator[bytes], _context: Any) -> bytes:
        for request in requests:
            self._rogue.took(len(request))
        return b""


_empty: Callable[[bytes, Any], bytes] = lambda _request, _context: b""  # noqa: E731
