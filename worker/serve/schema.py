"""What a client may ask for: OpenAI's request bodies as types.

Owns: the fields that are understood, with their limits. Invariant: a field that would change the answer and is not supported is
refused unless it has its neutral value; fields nobody has heard of are ignored, as OpenAI's servers do.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnstore.errors import InvalidArgument
from worker.engine.sampler import SEED_MAX, STOPS_MAX

CHOICES_MAX: Final = 64
"""Sequences that one request may start: prompts times `n`."""
_PRIORITY_MAX: Final = 1_000
_Request = TypeVar("_Request", bound="GenerationRequest")

_Zero = Annotated[float, Field(ge=0, le=0)]
_TokenIds = Annotated[list[int], Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk without choices counts the tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of request have in common. `top_k`, `ignore_eos` and `priority` are extensions, named as vLLM does."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    seed: int | None = Field(None, ge=0, le=SEED_MAX)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = Field(0, ge=-_PRIORITY_MAX, le=_PRIORITY_MAX)

    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """A stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A prompt is text or token ids."""

    prompt: str | _TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[_TokenIds], Field(min_length=1)]

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        token_lists = [part for part in self.prompt if isinstance(part, list)]
        return [*texts, *token_lists] or [[part for part in self.prompt if isinstance(part, int)]]


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_template_input(self) -> dict[str, str]:
        """What a chat template reads. `developer` is the newer name of `system`, which templates know."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)

    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def tokens_max(self) -> int | None:
        """The limit under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens


class InvalidRequest(InvalidArgument):
    """A body that is no valid request; `param` names the field."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def parse_request(kind: type[_Request], body: bytes) -> _Request:
    """The request in a JSON body. Raises `InvalidRequest` with the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise InvalidRequest(f"{param or 'the body'}: {first['msg']}", param) from None
