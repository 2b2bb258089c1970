"""The shell around every RPC: authentication, limits, metrics, typed errors.

Owns: the conversion of plain handler coroutines into gRPC method handlers, so that the servicer contains only the service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from attnstore.core.fair_share import FairShares
from attnstore.errors import AttnStoreError, DeadlineExceeded, Unauthenticated
from attnstore.limits import ATTEND_CALLS_MAX, CHALLENGE_BYTES, REFUSAL_CHARS_MAX, STREAMS_MAX, WATCHERS_MAX
from attnstore.logs import get_logger
from attnstore.peering import CREDENTIAL_PREFIX, Peering
from attnstore.telemetry import NodeMetrics
from attnstore.tokens import BEARER, holder
from attnstore.wire.messages import CHALLENGE, PROOF, SERVICE, Method
from attnstore.wire.status import rpc_status

Handler = Callable[[Any, Any, str], Awaitable[Any]]
"""`handler(request, context, tenant)`; for a client stream, the request is `None` and `context.read()` returns bytes."""

_log = get_logger(__name__)
_OF_NODES = frozenset({"Describe", "RegisterLayout", "Match", "Write", "OpenChannel"})
"""The methods that another node may call as the tenant whose pages it hands over."""


class Authenticator:
    """Maps a call's token to its tenant. Without configured tokens every caller is the tenant `default`."""

    def __init__(self, tenant_of_token: Mapping[str, str], peering: Peering | None = None) -> None:
        self._tenant_of_token = dict(tenant_of_token)
        self._peering = peering

    @property
    def tenants(self) -> int:
        """The number of tenants that the node serves."""
        return max(1, len(self._tenant_of_token))

    def tenant(self, context: Any, method: str) -> str:
        """Returns the caller's tenant, or the tenant for which another node hands pages over. Raises `Unauthenticated`."""
        if not self._tenant_of_token:
            return "default"
        metadata = dict(context.invocation_metadata() or ())
        given = str(metadata.get("authorization", ""))
        if not given.startswith(BEARER):
            raise Unauthenticated("this node asks for a token: connect with token=..., or set ATTNSTORE_TOKEN")
        token = given.removeprefix(BEARER)
        if self._peering is not None and token.startswith(CREDENTIAL_PREFIX):
            if method not in _OF_NODES:
                raise Unauthenticated(f"{method} is not for other nodes: their credential is for handing pages over")
            return self._peering.tenant_of(token)
        return self.tenant_of_token(token)

    async def answer_challenge(self, context: Any) -> None:
        """Proves to the caller, who need not be authenticated, that this node is a member of its cluster."""
        challenge = dict(context.invocation_metadata() or ()).get(CHALLENGE)
        if self._peering is not None and isinstance(challenge, bytes) and len(challenge) == CHALLENGE_BYTES:
            await context.send_initial_metadata(((PROOF, self._peering.proof(challenge)),))

    def tenant_of_token(self, given: str) -> str:
        """Returns the tenant of a token. Raises `Unauthenticated`."""
        found = holder(self._tenant_of_token, given)
        if found is None:
            raise Unauthenticated("the token is not one of this node's")
        return found


class RpcShell:
    """Wraps the handlers of one node."""

    def __init__(self, authenticator: Authenticator, metrics: NodeMetrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        tenants = authenticator.tenants
        # Calls that last as long as their caller likes are limited separately, so that they do not block reads and writes.
        self._lasting = {
            "Watch": FairShares(WATCHERS_MAX, "Watch calls", "end some", tenants=tenants),
            "Attend": FairShares(ATTEND_CALLS_MAX, "Attend calls", "end some, or attend over the page channel", tenants=tenants),
        }
        self._transfers = FairShares(STREAMS_MAX, "streams", "try again or use another node", tenants=tenants)

    @property
    def streams_in_flight(self) -> int:
        """The number of running streaming calls."""
        return self._transfers.used + sum(shares.used for shares in self._lasting.values())

    def generic_handler(self, handlers: Mapping[str, Handler], methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
        """Returns the gRPC handler of the whole service."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: self._method_handler(methods[name], handler) for name, handler in handlers.items()}
        )

    def _method_handler(self, method: Method, handler: Handler) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(request: Any, context: Any) -> Any:
            return await self._run(method, handler, request, context)

        async def client_stream(_requests: Any, context: Any) -> Any:
            return await self._run(method, handler, None, context)

        # Requests are decoded in `_limited`: errors raised in gRPC's own hook would reach the caller without our code.
        if method.streams_requests and method.streams_responses:
            return grpc.stream_stream_rpc_method_handler(client_stream, response_serializer=method.encode_response)
        if method.streams_requests:
            return grpc.stream_unary_rpc_method_handler(client_stream, response_serializer=method.encode_response)
        if method.streams_responses:
            return grpc.unary_stream_rpc_method_handler(unary, response_serializer=method.encode_response)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=method.encode_response)

    async def _run(self, method: Method, handler: Handler, request: Any, context: Any) -> Any:
        began = time.perf_counter()
        gauge = self._metrics.in_flight.labels(method.name)
        gauge.inc()
        code = "cancelled"
        try:
            result = await self._limited(method, handler, request, context)
            code = "ok"
            return result
        except AttnStoreError as error:
            code = error.code
            await _refuse(context, *rpc_status(error))
        except TimeoutError:
            code = DeadlineExceeded.code
            await _refuse(context, *rpc_status(DeadlineExceeded("the peer moved too little, or nothing, for --stall-ms")))
        except grpc.aio.InternalError:
            # The caller left while we were sending to it.
            raise asyncio.CancelledError from None
        except Exception as error:
            code = "internal"
            _log.exception("call failed", rpc=method.name)
            await _refuse(context, grpc.StatusCode.INTERNAL, f"{type(error).__name__} in the node; its log tells more")
        finally:
            gauge.dec()
            self._metrics.ended(method.name, code, time.perf_counter() - began)

    async def _limited(self, method: Method, handler: Handler, request: Any, context: Any) -> Any:
        if method.name == "Describe":
            await self._authenticator.answer_challenge(context)
        tenant = self._authenticator.tenant(context, method.name)
        if not method.streams_requests:
            request = method.decode_request(request)
        if not (method.streams_requests or method.streams_responses):
            return await handler(request, context, tenant)
        shares = self._lasting.get(method.name, self._transfers)
        shares.take(tenant)
        try:
            return await handler(request, context, tenant)
        finally:
            shares.give_back(tenant)


async def _refuse(context: Any, code: grpc.StatusCode, message: str, trailers: tuple[tuple[str, str], ...] = ()) -> None:
    try:
        await context.abort(code, message[:REFUSAL_CHARS_MAX], trailers)
    except grpc.aio.InternalError:
        # Nobody is left to tell; a cancelled call does not appear in gRPC's log.
        raise asyncio.CancelledError from None
    except grpc.aio.AbortError as abort:
        # gRPC stores the exception in the call, and its frames refer to the call and the request: a cycle until garbage collection.
        asyncio.get_running_loop().call_soon(_forget_frames, abort)
        raise


def _forget_frames(error: BaseException) -> None:
    error.__context__ = None
    error.with_traceback(None)
