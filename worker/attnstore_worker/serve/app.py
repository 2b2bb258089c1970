"""The OpenAI-compatible endpoint as an ASGI application.

Owns: the routes, and the answers to wrong, refused or abandoned requests.
Invariant: a failure before the first byte is answered by OpenAI's error body with a fitting status; a later failure ends the stream
with an error event; a client that disconnects costs at most one more step.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from dataclasses import asdict
from itertools import repeat
from typing import Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from attnstore.errors import AttnStoreError, InvalidArgument, Unauthenticated
from attnstore.limits import HTTP_BODY_BYTES_MAX, HTTP_BODY_MS_MAX
from attnstore_worker.cache import CostPlanner
from attnstore_worker.engine import AsyncEngine, SamplingParams
from attnstore_worker.errors import SequenceFailed
from attnstore_worker.model import LoadedModel
from attnstore_worker.model.prompts import chat_tokens, text_tokens
from attnstore_worker.options import SEED_MAX
from attnstore_worker.serve.choices import Choices, Piece
from attnstore_worker.serve.formats import STREAM_END, ChatFormat, CompletionFormat, Format, Json, error_body, event
from attnstore_worker.serve.guard import TokenGuard, caller_of
from attnstore_worker.serve.metrics import ServeMetrics
from attnstore_worker.serve.schema import (
    CHOICES_MAX,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    InvalidRequest,
    brief,
    parse_request,
)

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

_COMPLETION_TOKENS_DEFAULT: Final = 16
_DECISIONS_DEFAULT: Final = 20
_COUNT: Final = re.compile("[0-9]{1,9}")
_RATE_TOKENS: Final = 1_024
_RATE_CHUNK_TOKENS: Final = 256
_CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's status for a client that disconnected; only the metrics show it."""


class ModelNotFound(InvalidArgument):
    """The request names a model that is not served here."""

    code = "model_not_found"


class PriorityDenied(InvalidRequest):
    """The caller may not set a priority."""

    code = "permission_denied"


def create_app(
    engine: AsyncEngine, model: LoadedModel, tokens: Mapping[str, str] | None = None, priority_callers: Collection[str] = ()
) -> Starlette:
    """Returns the application, which serves `model` under its name. `tokens` (token -> caller) are the allowed tokens; without
    tokens everyone is allowed. `priority_callers` may give a request a priority.

    The caller keeps the engine running and closes it.
    """
    api = _Api(engine, model, priority_callers)
    return Starlette(
        middleware=[Middleware(TokenGuard, tokens=tokens, refuse=api.refused)] if tokens else [],
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{model_id:path}", api.model),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
            Route("/planner", api.planner),
        ],
        exception_handlers={
            AttnStoreError: api.refused,
            HTTPException: api.not_routed,
            ClientDisconnect: api.abandoned,
            Exception: api.broken,
        },
    )


class _Api:
    """The routes."""

    def __init__(self, engine: AsyncEngine, model: LoadedModel, priority_callers: Collection[str]) -> None:
        self._engine = engine
        self._model = model
        self._priority_callers = priority_callers
        self._metrics = ServeMetrics(lambda: engine.snapshot, engine.planner)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = parse_request(CompletionRequest, await _body(request))
        self._check(request, asked, len(asked.prompts))
        token_ids = [prompt if isinstance(prompt, list) else await self._text_tokens(prompt) for prompt in asked.prompts]
        tokens_max = asked.max_tokens or _COMPLETION_TOKENS_DEFAULT
        return await self._answer(request, asked, token_ids, tokens_max, CompletionFormat(self._model.name))

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = parse_request(ChatRequest, await _body(request))
        self._check(request, asked, 1)
        token_ids = await self._chat_tokens(asked)
        tokens_max = asked.tokens_max or self._model.context_tokens_max
        return await self._answer(request, asked, [token_ids], tokens_max, ChatFormat(self._model.name))

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        return self._reply("models", {"object": "list", "data": [self._model_body()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        self._check_model(request.path_params["model_id"])
        return self._reply("models", self._model_body())

    async def health(self, _: Request) -> Response:
        """`GET /health`: 200 while prompts are accepted."""
        return Response(status_code=200 if self._engine.alive else 503)

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def planner(self, request: Request) -> Response:
        """`GET /planner?last=N`: measured costs, the errors of predictions, and the last decisions."""
        last = request.query_params.get("last", str(_DECISIONS_DEFAULT))
        if not _COUNT.fullmatch(last):
            raise InvalidRequest("last: must be a whole number of at most nine digits", "last")
        planner = self._engine.planner
        if not isinstance(planner, CostPlanner):
            return self._reply("planner", {"decisions": []})
        report = planner.report()
        rate = report.prefill_tokens_per_s(_RATE_TOKENS, _RATE_CHUNK_TOKENS)
        body: dict[str, object] = {
            "costs": {**asdict(report), "prefill_tokens_per_s": rate},
            "predictions": asdict(planner.predictions()),
            "decisions": [decision.as_json() for decision in planner.decisions(int(last))],
        }
        return self._reply("planner", body)

    async def refused(self, request: Request, error: Exception) -> Response:
        """Answers an error of the tree: the client's fault, or retryable."""
        assert isinstance(error, AttnStoreError)
        status, kind = _status(error)
        param = error.param if isinstance(error, InvalidRequest) else None
        return self._failure(request, status, error_body(str(error), kind, param=param, code=error.code))

    async def not_routed(self, request: Request, error: Exception) -> Response:
        """Answers a wrong path or method, or a body beyond the limit."""
        assert isinstance(error, HTTPException)
        return self._failure(request, error.status_code, error_body(error.detail, "invalid_request_error", param=None, code=None))

    async def abandoned(self, request: Request, _: Exception) -> Response:
        """Answers a client that disconnected; nothing of it is read."""
        return self._failure(request, _CLIENT_CLOSED_REQUEST, {})

    async def broken(self, request: Request, _: Exception) -> Response:
        """Answers a bug; the server's log has the traceback."""
        return self._failure(request, 500, error_body("internal error", "server_error", param=None, code=None))

    async def _answer(
        self, request: Request, asked: GenerationRequest, prompts: list[list[int]], tokens_max: int, form: Format
    ) -> Response:
        per_prompt = asked.n or 1
        samplings = self._samplings(asked, per_prompt, tokens_max)
        choices = await Choices.submit(
            self._engine,
            [token_ids for token_ids in prompts for _ in range(per_prompt)],
            [sampling for _ in prompts for sampling in samplings],
            priority=asked.priority or 0,
            cache_salt=asked.cache_salt or "",
        )
        route = _route(request)
        if asked.stream:
            self._metrics.requests.labels(route, 200).inc()
            count = len(prompts) * per_prompt
            return _EventStream(self._events(choices, count, form, asked, per_prompt), choices.cancel)
        async with choices:
            texts, reasons = await _unless_gone(request, self._collect(choices, len(prompts) * per_prompt))
            return self._reply(route, form.answer(texts, reasons, choices.usage(per_prompt)))

    async def _collect(self, choices: Choices, count: int) -> tuple[list[str], list[str | None]]:
        texts, reasons = [""] * count, list[str | None](repeat(None, count))
        async for piece in self._timed(choices):
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason
        return texts, reasons

    async def _events(
        self, choices: Choices, count: int, form: Format, asked: GenerationRequest, per_prompt: int
    ) -> AsyncIterator[str]:
        for body in form.opening(count):
            yield event(body)
        try:
            async for piece in self._timed(choices):
                yield event(form.chunk(piece))
        except AttnStoreError as error:
            yield event(error_body(str(error), _status(error)[1], param=None, code=error.code))
            return
        if asked.include_usage:
            yield event(form.closing(choices.usage(per_prompt)))
        yield STREAM_END

    async def _timed(self, choices: Choices) -> AsyncIterator[Piece]:
        loop = asyncio.get_running_loop()
        asked_s, first = loop.time(), True
        async for piece in choices.pieces():
            if first:
                self._metrics.ttft_seconds.observe(loop.time() - asked_s)
                first = False
            yield piece

    async def _text_tokens(self, text: str) -> list[int]:
        """On another thread, because a body may have megabytes."""
        return await asyncio.to_thread(text_tokens, self._model.tokenizer, text)

    async def _chat_tokens(self, asked: ChatRequest) -> list[int]:
        messages = [message.as_template_input() for message in asked.messages]
        try:
            return await asyncio.to_thread(chat_tokens, self._model.tokenizer, messages)
        except InvalidArgument as error:
            raise InvalidRequest(f"messages: {error}", "messages") from None

    def _samplings(self, asked: GenerationRequest, count: int, tokens_max: int) -> list[SamplingParams]:
        if tokens_max > self._model.context_tokens_max:
            raise InvalidRequest(
                f"max_tokens is {tokens_max}; the context of {self._model.name} is {self._model.context_tokens_max}", "max_tokens"
            )
        first_seed = secrets.randbelow(SEED_MAX) if asked.seed is None else asked.seed
        return [
            SamplingParams(
                max_tokens=tokens_max,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_k=asked.top_k,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=(first_seed + index) % SEED_MAX,
                stop_token_ids=frozenset() if asked.ignore_eos else self._model.stop_token_ids,
                stops=asked.stops,
            )
            for index in range(count)
        ]

    def _check(self, request: Request, asked: GenerationRequest, prompts: int) -> None:
        """Refuses a request for reasons that do not need its prompt."""
        self._check_model(asked.model)
        if prompts * (asked.n or 1) > CHOICES_MAX:
            raise InvalidRequest(f"{prompts} prompts with n = {asked.n or 1}: at most {CHOICES_MAX} choices", "n")
        if asked.priority and caller_of(request) not in self._priority_callers:
            raise PriorityDenied("priority: this caller may not set one; --allow-priority names those who may", "priority")

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise ModelNotFound(f"the model {brief(name)!r} is not served here; {self._model.name!r} is")

    def _model_body(self) -> Json:
        context = self._model.context_tokens_max
        return {"id": self._model.name, "object": "model", "created": 0, "owned_by": "attnstore", "max_model_len": context}

    def _reply(self, route: str, body: Json) -> Response:
        self._metrics.requests.labels(route, 200).inc()
        return JSONResponse(body)

    def _failure(self, request: Request, status: int, body: Json) -> Response:
        self._metrics.requests.labels(_route(request), status).inc()
        return JSONResponse(body, status_code=status)


class _EventStream(StreamingResponse):
    """Server-sent events; `cancel` is called when the stream ends, whoever ended it."""

    def __init__(self, events: AsyncIterator[str], cancel: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(HTTP_BODY_MS_MAX / 1000):
            # To its end: a client that still sends when its connection closes would lose the answer.
            async for part in request.stream():
                if len(body) <= HTTP_BODY_BYTES_MAX:
                    body += part
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {HTTP_BODY_MS_MAX} ms") from None
    if len(body) > HTTP_BODY_BYTES_MAX:
        raise HTTPException(413, f"the body has more than {HTTP_BODY_BYTES_MAX} bytes")
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Returns the result of `work`, which is cancelled with `ClientDisconnect` when the client disconnects."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _status(error: AttnStoreError) -> tuple[int, str]:
    """Returns the HTTP status and OpenAI's type of an error."""
    if isinstance(error, Unauthenticated):
        return 401, "invalid_request_error"
    if isinstance(error, PriorityDenied):
        return 403, "invalid_request_error"
    if isinstance(error, ModelNotFound):
        return 404, "invalid_request_error"
    if isinstance(error, SequenceFailed):
        return 500, "server_error"
    return (503, "server_error") if error.retryable else (400, "invalid_request_error")


def _route(request: Request) -> str:
    """Returns a label from a closed set."""
    path = request.url.path
    known = {"/v1/completions": "completions", "/v1/chat/completions": "chat_completions", "/v1/models": "models"}
    return known.get(path, "other")
