"""The valid characters of a token."""

from __future__ import annotations

from attnstore.tokens import is_token


def test_tokens_travel_in_headers() -> None:
    assert all(map(is_token, ("a", "s3cret!~", "x" * 1000)))
    assert not any(map(is_token, ("", "a b", "ä", "a\n", "a\t")))
