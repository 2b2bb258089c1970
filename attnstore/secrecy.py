"""What a message may show of text that a user gave and that could not be understood.

Owns: that question. Invariant: text that may have a login in it is not shown at all. Which part of it is the password cannot be
known: where a URL cannot be parsed, that is often because its password has a `/`, `#` or `@` that should have been percent-encoded.
"""

from __future__ import annotations

from typing import Final

_HIDDEN: Final = "(not shown: it may have a password in it)"
_SCHEMES: Final = frozenset({"grpc", "grpcs", "http", "https"})
"""URLs with these have no login; with any other, whatever was meant, they may."""
_CHARS_MAX: Final = 100


def may_have_login(text: str) -> bool:
    """Whether the text may not be shown."""
    scheme, separator, _ = text.partition("://")
    return "@" in text or (separator != "" and scheme not in _SCHEMES)


def shown(text: str) -> str:
    """The text in quotes, its beginning where it is long, or what stands for it. One line, whatever is in the text."""
    if may_have_login(text):
        return _HIDDEN
    return repr(text) if len(text) <= _CHARS_MAX else f"{text[:_CHARS_MAX]!r}..."
