"""Bearer tokens: their format and their holders.

Separate from the options, so that clients need not load the options' dependencies.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

BEARER: Final = "Bearer "
"""The prefix of the token in the header `authorization`."""


def is_token(text: str) -> bool:
    """Returns whether a token can be sent in a header: printable ASCII without spaces, and not empty."""
    return text != "" and all("!" <= character <= "~" for character in text)


def holder(holders: Mapping[str, str], given: str) -> str | None:
    """Returns the holder of the token `given`, from token -> holder, or None for an unknown one. Compares every token, in constant
    time.
    """
    found = None
    for token, name in holders.items():
        if hmac.compare_digest(token.encode(), given.encode(errors="surrogateescape")):
            found = name
    return found
