"""The validity of the certificate that a node presents.

Owns: `Certificate`. Invariant: a node does not start with a certificate whose dates every client would refuse.

The dates are read from a TLS handshake in memory, because the standard library can do that without parsing ASN.1; the handshake
also checks that certificate and key match. Other certificates in the files are not examined.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from attnstore.errors import InvalidArgument

_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the module ssl has no name: the caller's clock decides about the dates here."""
_SOON_S: Final = 14 * 86_400
_ROUNDS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Certificate:
    """The validity period, in seconds since 1970, of the certificate in `path`."""

    path: Path
    begins_s: float
    ends_s: float

    @classmethod
    def load(cls, cert: Path, key: Path) -> Self:
        """Reads the files. Raises `InvalidArgument` if they are not a usable pair."""
        try:
            node, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # No prompt for a password: a node starts unattended.
            node.load_cert_chain(cert, key, password="")
            client.load_verify_locations(cert)
            client.check_hostname = False
            client.verify_flags = ssl.VerifyFlags(int(ssl.VERIFY_X509_PARTIAL_CHAIN) | _NO_CHECK_TIME)
            shown = _shake_hands(node, client)
        except OSError as error:  # includes SSLError
            raise InvalidArgument(f"--tls-cert {cert} and --tls-key {key} are no usable pair of PEM files: {error}") from None
        return cls(cert, ssl.cert_time_to_seconds(shown["notBefore"]), ssl.cert_time_to_seconds(shown["notAfter"]))

    def check(self, now_s: float) -> None:
        """Raises `InvalidArgument` unless the certificate is valid now."""
        if now_s > self.ends_s:
            raise InvalidArgument(f"--tls-cert {self.path} expired on {_date(self.ends_s)}: no client would accept it; renew it")
        if now_s < self.begins_s:
            raise InvalidArgument(
                f"--tls-cert {self.path} is not valid before {_date(self.begins_s)}, but the clock here says {_date(now_s)}"
            )

    def days_left(self, now_s: float) -> int | None:
        """Returns the whole days until it expires, or None if there are too many to warn."""
        left_s = self.ends_s - now_s
        return int(left_s // 86_400) if left_s < _SOON_S else None


def _shake_hands(node: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, str]:
    to_node, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_node), node.wrap_bio(to_node, to_client, server_side=True))
    for _ in range(_ROUNDS_MAX):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = ends[0].getpeercert()
    if not shown:
        raise OSError("a TLS handshake with them does not end")
    return {name: str(value) for name, value in shown.items()}


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
