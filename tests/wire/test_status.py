"""Typed errors cross gRPC unchanged; errors of gRPC itself or of a proxy are mapped conservatively."""

from __future__ import annotations

import grpc
import pytest

from attnstore import errors
from attnstore.wire.messages import ERROR_TRAILER
from attnstore.wire.status import error_from_rpc, rpc_status
from tests.test_errors import LEAVES


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_error_comes_back_as_itself(leaf: type[errors.AttnStoreError]) -> None:
    code, message, trailers = rpc_status(leaf("the cause; the fix"))
    assert code is not grpc.StatusCode.INTERNAL
    back = error_from_rpc(code, message, trailers)
    assert type(back) is leaf
    assert str(back) == "the cause; the fix"


def test_a_trailer_may_come_as_bytes() -> None:
    assert type(error_from_rpc(grpc.StatusCode.ABORTED, "", ((ERROR_TRAILER, b"lease_expired"),))) is errors.LeaseExpired


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.INTERNAL, errors.Unavailable),
        (grpc.StatusCode.UNKNOWN, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.InvalidArgument),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
    ],
)
@pytest.mark.parametrize("trailers", [(), ((ERROR_TRAILER, "from the future"),), ((ERROR_TRAILER, b"\xff"),)])
def test_a_status_without_a_code_of_ours_is_judged_by_its_own(
    code: grpc.StatusCode, expected: type[errors.AttnStoreError], trailers: tuple[tuple[str, str | bytes], ...]
) -> None:
    error = error_from_rpc(code, "", trailers)
    assert type(error) is expected
    assert code.name in str(error)
