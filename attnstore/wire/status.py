"""Typed errors over gRPC: a status code for every client, and our own code in a trailer for our clients.

Invariant: `error_from_rpc(*rpc_status(error))` has the class of `error` for every class of the tree.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from attnstore import errors
from attnstore.wire.messages import ERROR_TRAILER

_CODE_OF_ERROR: dict[type[errors.AttnStoreError], grpc.StatusCode] = {
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.LeaseExpired: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BufferMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NamespaceUnknown: grpc.StatusCode.NOT_FOUND,
    errors.LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ClientClosed: grpc.StatusCode.CANCELLED,
}

# The error for a status without our trailer: it comes from gRPC itself or from a proxy. Retryable unless the call is wrong.
_ERROR_OF_CODE: dict[grpc.StatusCode, type[errors.AttnStoreError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgument,
}

_UNTRUSTED = "its TLS certificate is of no authority that is trusted here: name the right one as tls_ca"

# gRPC's messages for a failed TLS handshake, and our explanation.
_TLS_REASONS = (
    ("certificate has expired", "its TLS certificate has expired: renew it, or look at this machine's clock"),
    ("certificate is not yet valid", "its TLS certificate is not valid yet: look at the clocks of both machines"),
    ("Hostname Verification Check failed", "its TLS certificate is for another name than the one it was reached by"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: say grpc://"),
    ("self signed certificate", _UNTRUSTED),
    ("unable to get local issuer certificate", _UNTRUSTED),
    ("CERTIFICATE_VERIFY_FAILED", "its TLS certificate is refused"),
    ("Tls handshake failed", "the TLS handshake with it failed"),
)

Trailers = Iterable[tuple[str, str | bytes]]


def rpc_status(error: errors.AttnStoreError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Returns `(status code, message, trailing metadata)` that carry `error` to the caller."""
    return _CODE_OF_ERROR.get(type(error), grpc.StatusCode.INTERNAL), str(error), ((ERROR_TRAILER, error.code),)


def error_from_rpc(code: grpc.StatusCode, message: str, trailers: Trailers) -> errors.AttnStoreError:
    """Returns the typed error of a failed call. Unknown codes without our trailer are `Unavailable` (retryable)."""
    for key, value in trailers:
        if key == ERROR_TRAILER:
            cls = errors.error_of_code(value if isinstance(value, str) else value.decode("ascii", "replace"))
            if cls is not None:
                return cls(message)
    meaning = next((f"{meaning}: " for words, meaning in _TLS_REASONS if words in message), "")
    return _ERROR_OF_CODE.get(code, errors.Unavailable)(f"{meaning}{message or 'no details'} ({code.name})")
