"""What a client may ask for: OpenAI's request bodies as types.

Owns: the fields that are served, with their limits; those that are not are in `worker.serve.fields`. Invariant: a field that could
change the answer is served or refused by its name. Null says that a field is not given, as in OpenAI's API.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from attnstore.errors import InvalidArgument
from attnstore.limits import CACHE_SALT_CHARACTERS_MAX
from worker.engine.sampler import SEED_MAX, STOPS_MAX
from worker.serve.fields import CHAT_UNSERVED, COMPLETION_UNSERVED, WITHOUT_EFFECT, Neutral, asks_for_nothing

CHOICES_MAX: Final = 64
"""Sequences that one request may start: prompts times `n`."""
_PRIORITY_MAX: Final = 1_000
_SHOWN_CHARACTERS_MAX: Final = 100
_Request = TypeVar("_Request", bound="GenerationRequest")

_TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk without choices counts the tokens."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationRequest(BaseModel):
    """What both kinds of request have in common. `top_k`, `ignore_eos`, `priority` and `cache_salt` are extensions, named as vLLM
    does. Requests with different salts share no page, those with equal ones do.
    """

    model_config = ConfigDict(strict=True)
    unserved: ClassVar[Neutral]

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    seed: int | None = Field(None, ge=0, le=SEED_MAX)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS_MAX)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = Field(0, ge=-_PRIORITY_MAX, le=_PRIORITY_MAX)
    cache_salt: str = Field("", min_length=1, max_length=CACHE_SALT_CHARACTERS_MAX)

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


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A call that the assistant made. OpenAI's API has its arguments as JSON text, chat templates read them as an object."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, arguments: object) -> object:
        return from_json(arguments, allow_inf_nan=False) if isinstance(arguments, str) else arguments


class ToolCall(BaseModel):
    """A call of a tool. `index` is its place in a stream, which clients send back with it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, exclude=True)


class Message(BaseModel):
    """One message of a conversation. Which roles and fields go together is for the model's chat template to say.

    `audio` and `annotations` are what an answer has that a client sends back.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, exclude=True)

    def as_template_input(self) -> dict[str, Any]:
        """What a chat template reads. `developer` is the newer name of `system`, which templates know."""
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
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is no JSON: {error}", None) from None
    if not isinstance(given, dict):
        raise InvalidRequest("the body is no JSON object", None)
    try:
        return kind.model_validate(_served(kind, given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = brief(".".join(map(str, first["loc"])))
        raise InvalidRequest(f"{param}: {first['msg']}", param) from None


def brief(text: str) -> str:
    """As much of a text of the caller's as a message in one line has room for."""
    return " ".join(text[:_SHOWN_CHARACTERS_MAX].split())


def _served(kind: type[GenerationRequest], given: dict[str, Any]) -> dict[str, Any]:
    """The fields that are served. Raises `InvalidRequest` for one that would have to be ignored."""
    served = {}
    for name, value in given.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name in kind.model_fields:
            served[name] = value
        elif name not in kind.unserved:
            raise InvalidRequest(f"{brief(name)!r} is no field of this request", brief(name))
        elif not asks_for_nothing(value, neutral := kind.unserved[name]):
            spared = "".join(f" or send {json.dumps(each)}" for each in neutral)
            raise InvalidRequest(f"{name} is not supported: leave it out{spared}", name)
    return served
