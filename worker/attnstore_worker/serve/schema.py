"""OpenAI's request bodies as types.

Owns: the served fields, with their limits; `fields` has the others. Invariant: a field that could change the answer is served or
refused by name. A field that is null counts as absent, as in OpenAI's API.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json

from attnstore.errors import InvalidArgument
from attnstore.limits import CACHE_SALT_CHARACTERS_MAX, HTTP_BODY_BRACKETS_MAX
from attnstore_worker.engine.sampler import STOPS_MAX
from attnstore_worker.options import SEED_MAX
from attnstore_worker.serve.fields import CHAT_UNSERVED, COMPLETION_UNSERVED, WITHOUT_EFFECT, Neutral, asks_for_nothing

CHOICES_MAX: Final = 64
"""Sequences of one request: prompts times `n`."""
_PRIORITY_MAX: Final = 1_000
_SHOWN_CHARACTERS_MAX: Final = 100
_Request = TypeVar("_Request", bound="GenerationRequest")

_TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_CONFIG: Final = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""Other fields are kept, to be refused. `extra="forbid"` would report an error for each of them, and a body has room
for 300,000.
"""


class _Part(BaseModel):
    """A part of a request, which allows only its own fields. No list in it may report more than one error, for the same reason."""

    model_config = _CONFIG

    @model_validator(mode="after")
    def _closed(self) -> Self:
        for name in self.model_extra or ():
            raise PydanticCustomError("unknown_field", "{name} is no field of it", {"name": repr(brief(name))})
        return self


class StreamOptions(_Part):
    """`include_usage`: a last chunk without choices counts the tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """The fields shared by both kinds of request. `top_k`, `ignore_eos`, `priority` and `cache_salt` are extensions with vLLM's
    names. Requests with different salts share no page; those with equal salts do.
    """

    model_config = _CONFIG
    unserved: ClassVar[Neutral]

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    seed: int | None = Field(None, ge=0, le=SEED_MAX)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS_MAX, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-_PRIORITY_MAX, le=_PRIORITY_MAX)
    cache_salt: str | None = Field(None, min_length=1, max_length=CACHE_SALT_CHARACTERS_MAX)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A prompt is text or token ids."""

    unserved = COMPLETION_UNSERVED

    prompt: (
        str
        | _TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=CHOICES_MAX, fail_fast=True)]
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=CHOICES_MAX, fail_fast=True)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        token_lists = [part for part in self.prompt if isinstance(part, list)]
        return [*texts, *token_lists] or [[part for part in self.prompt if isinstance(part, int)]]


class TextPart(_Part):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(_Part):
    """A call made by the assistant. OpenAI's API has its arguments as JSON text; chat templates read them as an object."""

    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, arguments: object) -> object:
        return from_json(arguments, allow_inf_nan=False) if isinstance(arguments, str) else arguments


class ToolCall(_Part):
    """A call of a tool. `index` is its position in a stream, which clients send back with it."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: int | None = Field(None, exclude=True)


class Message(_Part):
    """One message of a conversation. The model's chat template decides which roles and fields go together.

    `audio` and `annotations` are fields of answers that clients send back.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, exclude=True)

    def as_template_input(self) -> dict[str, Any]:
        """Returns the message for a chat template. `developer` is the newer name of `system`, which templates know."""
        fields = self.model_dump(exclude_none=True)
        if not self.tool_calls:
            fields.pop("tool_calls", None)
        if isinstance(self.content, list):
            fields["content"] = "".join(part.text for part in self.content)
        return {**fields, "role": "system" if self.role == "developer" else self.role}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    unserved = CHAT_UNSERVED

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def tokens_max(self) -> int | None:
        """The limit, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens


class InvalidRequest(InvalidArgument):
    """A body that is not a valid request; `param` names the field."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def parse_request(kind: type[_Request], body: bytes) -> _Request:
    """Parses the request in a JSON body. Raises `InvalidRequest` with its first error."""
    if body.count(b"[") + body.count(b"{") > HTTP_BODY_BRACKETS_MAX:
        raise InvalidRequest(f"the body has more than {HTTP_BODY_BRACKETS_MAX} lists and objects", None)
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = brief(".".join(map(str, first["loc"]))) or None
        raise InvalidRequest(f"{param or 'the body'}: {first['msg']}", param) from None
    for name, value in (request.model_extra or {}).items():
        _check_unserved(kind.unserved, name, value)
    return request


def brief(text: str) -> str:
    """Shortens a text of the caller's for a message of one line."""
    return " ".join(text[:_SHOWN_CHARACTERS_MAX].split())


def _check_unserved(unserved: Neutral, name: str, value: object) -> None:
    """Refuses a field that would have to be ignored."""
    if value is None or name in WITHOUT_EFFECT:
        return
    if name not in unserved:
        raise InvalidRequest(f"{brief(name)!r} is no field of this request", brief(name))
    if not asks_for_nothing(value, neutral := unserved[name]):
        spared = "".join(f" or send {json.dumps(each)}" for each in neutral)
        raise InvalidRequest(f"{name} is not supported: leave it out{spared}", name)
