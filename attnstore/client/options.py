"""How a client is told to reach its node: everything that `connect` takes, checked before anything is sent."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from attnstore.client.bulk import TransportName, checked_transport
from attnstore.client.grpc_transport import Target
from attnstore.config import is_token
from attnstore.errors import InvalidArgument
from attnstore.limits import CHANNELS_MAX, DEADLINE_MS_MAX


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How a client reaches its node. `tls_ca`: PEM certificates of the trusted authorities, None for the system's."""

    target: Target
    deadline_ms: float
    token: str | None = field(repr=False)
    tls_ca: bytes | None = field(repr=False)
    transport: TransportName
    channels: int

    @classmethod
    def create(
        cls, target: str, *, deadline_ms: float, token: str | None, tls_ca: str | Path | None, transport: str, channels: int
    ) -> ConnectOptions:
        """Options from what a user gives; the token falls back to the environment's `ATTNSTORE_TOKEN`.

        Raises `InvalidArgument` for a bad value or a `tls_ca` file that cannot be read.
        """
        parsed = Target.parse(target)
        token = token or os.environ.get("ATTNSTORE_TOKEN")
        if token is not None and not is_token(token):
            raise InvalidArgument("token must be printable ASCII without spaces")
        if tls_ca is not None and not parsed.tls:
            raise InvalidArgument(f"tls_ca is given, but target {target!r} does not use TLS: say grpcs://")
        try:
            authorities = Path(tls_ca).read_bytes() if tls_ca is not None else None
        except OSError as error:
            raise InvalidArgument(f"tls_ca {tls_ca} cannot be read: {error.strerror}") from None
        return cls(
            parsed,
            checked_deadline_ms(deadline_ms),
            token,
            authorities,
            checked_transport(transport),
            _checked_channels(channels),
        )


def _checked_channels(channels: int) -> int:
    if not 1 <= channels <= CHANNELS_MAX:
        raise InvalidArgument(f"channels is {channels}; it must be between 1 and {CHANNELS_MAX}")
    return channels


def checked_deadline_ms(deadline_ms: float) -> float:
    """`deadline_ms` itself; raises `InvalidArgument` unless it is positive and at most `limits.DEADLINE_MS_MAX`."""
    if not 0 < deadline_ms <= DEADLINE_MS_MAX:
        raise InvalidArgument(f"deadline_ms is {deadline_ms}; it must be positive and at most {DEADLINE_MS_MAX}")
    return float(deadline_ms)
