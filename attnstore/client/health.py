"""Checks whether a node serves, with gRPC's standard health protocol, like an orchestrator's probe.

A draining node answers that it does not serve, so that it gets no new callers. Needs no token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attnstore.client.options import Target, checked_deadline_ms
from attnstore.client.transports.rpc import proxy_options
from attnstore.client.transports.tls_probe import explained
from attnstore.errors import InvalidArgument, Unavailable
from attnstore.wire.status import error_from_rpc


def check_serving(target: str, *, deadline_ms: float, tls_ca: Path | None = None, http_proxy: str | None = None) -> None:
    """Returns if the node at `target` serves. Raises `Unavailable` if it does not, or does not answer within `deadline_ms`;
    `InvalidArgument` for a malformed target or deadline or a `tls_ca` that cannot be read.
    """
    parsed = Target.parse(target)
    timeout_s, began_s = checked_deadline_ms(deadline_ms) / 1000, time.monotonic()
    try:
        authorities = tls_ca.read_bytes() if tls_ca is not None else None
    except OSError as error:
        raise InvalidArgument(f"tls_ca {tls_ca} cannot be read: {error.strerror}") from None
    credentials = grpc.ssl_channel_credentials(authorities)
    address, options = str(parsed.address), proxy_options(http_proxy)
    channel = grpc.secure_channel(address, credentials, options) if parsed.tls else grpc.insecure_channel(address, options)
    with channel:
        try:
            # The published types of this stub lack its methods.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            failed = error_from_rpc(error.code(), error.details() or "", ())
            if isinstance(failed, Unavailable) and not parsed.tls and http_proxy is None:
                failed = explained(failed, parsed.address, began_s + timeout_s - time.monotonic())
            raise Unavailable(f"{target} does not answer: {error.code().name.lower()}: {failed}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{target} does not serve: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status).lower()}")
