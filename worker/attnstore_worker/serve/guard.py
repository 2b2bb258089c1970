"""Authentication of the endpoint's callers by token, if it has tokens.

Owns: the middleware in front of all routes. Invariant: with tokens, only `/health` and `/metrics` answer a caller without one;
orchestrators and Prometheus use them, and neither shows a prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from attnstore.errors import Unauthenticated
from attnstore.tokens import BEARER, holder

ANYONE: Final = "default"
"""The name of the only caller: the holder of the single token, or everyone if there is none."""
_OPEN_PATHS: Final = frozenset({"/health", "/metrics"})
_CALLER: Final = "attnstore.caller"


class InvalidApiKey(Unauthenticated):
    """A missing or unknown token; the code is OpenAI's."""

    code = "invalid_api_key"


def caller_of(request: Request) -> str:
    """Returns the caller whose token the request has."""
    name: str = request.scope.get(_CALLER, ANYONE)
    return name


class TokenGuard:
    """ASGI middleware; `refuse` creates the answer to a caller without a token."""

    def __init__(
        self, app: ASGIApp, tokens: Mapping[str, str], refuse: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            request = Request(scope)
            given = request.headers.get("authorization", "")
            caller = holder(self._tokens, given.removeprefix(BEARER)) if given.startswith(BEARER) else None
            if caller is None:
                error = InvalidApiKey("this worker asks for one of its tokens: Authorization: Bearer TOKEN")
                response = await self._refuse(request, error)
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
            scope[_CALLER] = caller
        await self._app(scope, receive, send)
