"""Incremental detokenization, with stop strings.

Owns: `TextStream`. Invariant: the returned pieces, joined, are a prefix of the text of all tokens; no returned text is ever
revoked, so a piece is held back while it may still be part of a character or the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HELD_TOKENS_MAX: Final = 8
"""A character has at most four bytes, so invalid bytes after that many tokens never become one."""

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one sequence; it ends before the first of `stops`.

    A token's text may depend on the previous token and may be part of a character. Tokens are therefore decoded in a window that
    starts at the last whole character; the text of a token is what it adds to the window's text.

    >>> stream = TextStream(lambda token_ids: "".join(map(chr, token_ids)), stops=("END",))
    >>> [stream.push(ord(letter)) for letter in "axENxEND"]
    ['a', 'x', '', '', 'ENx', '', '', '']
    >>> stream.stopped
    True
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._context: list[int] = []  # already returned; decoded again only for its effect on its successors
        self._fresh: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that became final with `token_id`."""
        self._fresh.append(token_id)
        piece = self._grown()
        if piece.endswith(_REPLACEMENT) and len(self._fresh) < _HELD_TOKENS_MAX:
            return ""
        self._context, self._fresh = self._fresh, []
        return self._give_out(piece)

    def finish(self) -> str:
        """Returns the text still held back, including partial characters. Empty once a stop string was found."""
        rest = "" if self.stopped else self._held + self._grown()
        self._held, self._fresh = "", []
        return rest

    def _grown(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode([*self._context, *self._fresh])[len(before) :]

    def _give_out(self, piece: str) -> str:
        text = self._held + piece
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
