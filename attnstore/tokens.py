"""Bearer tokens: what they may be made of.

Exists apart from the options so that clients need not load what reads options.
"""

from __future__ import annotations


def is_token(text: str) -> bool:
    """Whether a token can travel in a header: printable ASCII without spaces, and not empty."""
    return text != "" and all("!" <= character <= "~" for character in text)
