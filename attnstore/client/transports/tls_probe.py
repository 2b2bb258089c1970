"""Detects whether a node that closed an unencrypted connection requires TLS: gRPC only reports "Socket closed".

Owns: one handshake, which ignores the certificate and sends nothing of the caller's.
"""

from __future__ import annotations

import ssl

from attnstore.address import Address
from attnstore.errors import Unavailable

_PROBE_S_MAX = 1.0


def explained(error: Unavailable, address: Address, left_s: float) -> Unavailable:
    """Returns the error of an unencrypted call, with a hint if the node speaks TLS. Blocks for a second, or the time
    left, at most.
    """
    if left_s > 0 and _speaks_tls(address, min(_PROBE_S_MAX, left_s) / 2):
        return Unavailable(f"it speaks TLS: say grpcs://: {error}")
    return error


def _speaks_tls(address: Address, step_s: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with address.connect(step_s) as connection:
            connection.settimeout(step_s)
            context.wrap_socket(connection).close()
    except OSError:
        return False
    return True
