"""The display of user text that could not be parsed and may contain a password.

Owns: that decision. Invariant: text that may contain a login is not shown at all, because its password cannot be located: a URL
often fails to parse because its password contains a `/`, `#` or `@` that should have been percent-encoded.
"""

from __future__ import annotations

from typing import Final

_HIDDEN: Final = "(not shown: it may have a password in it)"
_SCHEMES: Final = frozenset({"grpc", "grpcs", "http", "https"})
"""URLs with these schemes have no login; any other text may have one."""
_CHARS_MAX: Final = 100


def may_have_login(text: str) -> bool:
    """Returns whether the text must not be shown."""
    scheme, separator, _ = text.partition("://")
    return "@" in text or (separator != "" and scheme not in _SCHEMES)


def shown(text: str) -> str:
    """Returns the text in quotes, truncated if it is long, or a placeholder. Always one line."""
    if may_have_login(text):
        return _HIDDEN
    return repr(text) if len(text) <= _CHARS_MAX else f"{text[:_CHARS_MAX]!r}..."
