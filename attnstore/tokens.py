"""Bearer tokens: what they may be made of, and whose one is.

Exists apart from the options so that clients need not load what reads options.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

BEARER: Final = "Bearer "
"""What stands before the token in a header `authorization`."""


def is_token(text: str) -> bool:
    """Whether a token can travel in a header: printable ASCII without spaces, and not empty."""
    return text != "" and all("!" <= character <= "~" for character in text)


def holder(holders: Mapping[str, str], given: str) -> str | None:
    """Who holds the token `given`, of token -> holder; None for an unknown one. Each token is compared, in constant time."""
    found = None
    for token, name in holders.items():
        if hmac.compare_digest(token.encode(), given.encode(errors="surrogateescape")):
            found = name
    return found
