"""The bodies of OpenAI's responses.

Owns: their shapes, for a whole answer and for the chunks of a stream. The two kinds of request differ only in these.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from attnstore_worker.serve.choices import Piece, Usage

Json = dict[str, object]

STREAM_END = "data: [DONE]\n\n"


class Format(Protocol):
    """The bodies of one answer."""

    def answer(self, texts: Sequence[str], reasons: Sequence[str | None], usage: Usage) -> Json:
        """Returns the whole answer: a text and a finish reason for each choice."""
        ...

    def opening(self, choices: int) -> Iterable[Json]:
        """Returns the chunks before the first text."""
        ...

    def chunk(self, piece: Piece) -> Json:
        """Returns a chunk of a stream."""
        ...

    def closing(self, usage: Usage) -> Json:
        """Returns the chunk without choices that contains the token counts."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """Of `/v1/completions`."""

    model: str
    answer_id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    def answer(self, texts: Sequence[str], reasons: Sequence[str | None], usage: Usage) -> Json:
        """Returns the whole answer."""
        pairs = enumerate(zip(texts, reasons, strict=True))
        return self._body([_completion_choice(index, text, reason) for index, (text, reason) in pairs], usage=usage.as_json())

    def opening(self, choices: int) -> Iterable[Json]:
        """Returns nothing: the text begins at once."""
        del choices
        return ()

    def chunk(self, piece: Piece) -> Json:
        """Returns a chunk of a stream."""
        return self._body([_completion_choice(piece.index, piece.text, piece.finish_reason)])

    def closing(self, usage: Usage) -> Json:
        """Returns the chunk with the token counts."""
        return self._body([], usage=usage.as_json())

    def _body(self, choices: list[Json], **others: object) -> Json:
        body = {"id": self.answer_id, "object": "text_completion", "created": self.created_s, "model": self.model}
        return {**body, "choices": choices, **others}


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Of `/v1/chat/completions`."""

    model: str
    answer_id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    def answer(self, texts: Sequence[str], reasons: Sequence[str | None], usage: Usage) -> Json:
        """Returns the whole answer."""
        choices = [
            _chat_choice(index, "message", {"role": "assistant", "content": text}, reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._body("chat.completion", choices, usage=usage.as_json())

    def opening(self, choices: int) -> Iterable[Json]:
        """Returns the role, which precedes the text."""
        return (self._chunk(index, {"role": "assistant", "content": ""}, None) for index in range(choices))

    def chunk(self, piece: Piece) -> Json:
        """Returns a chunk of a stream."""
        return self._chunk(piece.index, {"content": piece.text} if piece.text else {}, piece.finish_reason)

    def closing(self, usage: Usage) -> Json:
        """Returns the chunk with the token counts."""
        return self._body("chat.completion.chunk", [], usage=usage.as_json())

    def _chunk(self, index: int, delta: Json, reason: str | None) -> Json:
        return self._body("chat.completion.chunk", [_chat_choice(index, "delta", delta, reason)])

    def _body(self, kind: str, choices: list[Json], **others: object) -> Json:
        body = {"id": self.answer_id, "object": kind, "created": self.created_s, "model": self.model}
        return {**body, "choices": choices, **others}


def error_body(message: str, kind: str, *, param: str | None, code: str | None) -> Json:
    """Returns OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Json) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _completion_choice(index: int, text: str, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _chat_choice(index: int, part: str, content: Json, reason: str | None) -> Json:
    return {"index": index, part: content, "logprobs": None, "finish_reason": reason}
