"""Requests made invalid in many ways, from a seed.

Owns: `requests`. Invariant: the same seed gives the same requests. A request with an incomplete body is marked as such, because
only it may remain unanswered.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from attnstore_worker.serve.fields import CHAT_UNSERVED, COMPLETION_UNSERVED, WITHOUT_EFFECT

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_CALL: Final = {"id": "1", "type": "function", "function": {"name": "where", "arguments": '{"city": "Rome"}'}}
_COMMON: Final[dict[str, Any]] = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 2, "seed": 7, "stop": ["x"]}
_OPTIONS: Final[dict[str, Any]] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "cache_salt": "salt",
    "user": "ada",
    "priority": 0,
    "frequency_penalty": 0,
}
_COMPLETIONS: Final[tuple[dict[str, Any], ...]] = (
    {"prompt": "Once upon a time"},
    {"prompt": ["Once", "upon"]},
    {"prompt": [5, 6, 7]},
    {"prompt": [[5, 6, 7], [8]]},
)
_CONVERSATIONS: Final[tuple[dict[str, Any], ...]] = (
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "x", "tool_call_id": "1"},
        ]
    },
    {"messages": [{"role": "user", "content": "Hello", "name": "ada"}], "max_completion_tokens": 3},
)
_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e308, 10**30, -(10**30), 1 << 63, 1 << 31, 49_151, 49_152),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "x" * 5_000,
        "\0",
        "\ud800",
        "a\udc00b",
        "\n\r\u2028",
        "🙂" * 50,
        "<|im_end|>",
        "NaN",
        "{{ 1 }}",
        "../../etc/passwd",
    ),
    *([], {}, [None], [[]], [[[]]], {"a": {"b": []}}, [0] * 500, ["x"] * 100, [1, "x"], {"type": "text"}, {"": None}),
)
_PATHS: Final = (
    *("/v1/models", "/v1/models/x%00y", "/health", "/metrics", "/", "//", "/v1", "/%ff"),
    *("/planner", "/planner?last=x", "/planner?last=-5", "/planner?last=0", "/planner?last=" + "9" * 5_000),
)
_DEPTHS: Final = (50, 190, 250, 100_000)


@dataclass(frozen=True, slots=True)
class FuzzedRequest:
    """One request as it is sent. `complete`: the server gets everything that the head announces."""

    path: str
    body: bytes
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = field(default=(("content-type", "application/json"),))
    length: str | None = None
    chunked: bool = False
    complete: bool = True

    def wire(self) -> bytes:
        """Its bytes."""
        length = ("transfer-encoding", "chunked") if self.chunked else ("content-length", self.length or str(len(self.body)))
        lines = [f"{self.method} {self.path} HTTP/1.1", "host: x", "connection: close"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, length)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


def requests(seed: int, count: int, model: str) -> Iterator[FuzzedRequest]:
    """Yields `count` requests for a worker that serves `model`; about one of ten is valid."""
    source = random.Random(seed)
    for _ in range(count):
        request = FuzzedRequest(source.choice((CHAT, COMPLETIONS)), b"")
        body = _right_body(source, request.path, model)
        for _ in range(source.choice((0, 1, 1, 1, 2, 3))):
            source.choice(_BODY_FAULTS)(source, body)
        request = FuzzedRequest(request.path, _json(source, body))
        if source.random() < 0.3:
            request = source.choice(_WIRE_FAULTS)(source, request)
        yield request


def _right_body(source: random.Random, path: str, model: str) -> dict[str, Any]:
    body = {"model": model, **source.choice(_CONVERSATIONS if path == CHAT else _COMPLETIONS)}
    for fields, most in ((_COMMON, 7), (_OPTIONS, 3)):
        names = source.sample(sorted(fields), source.randint(0, most))
        body |= {name: fields[name] for name in names}
    if path == COMPLETIONS or source.random() < 0.9:
        body.setdefault("max_tokens", 3)
    return copy.deepcopy(body)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each container in it with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(each)


def _place(source: random.Random, body: dict[str, Any]) -> tuple[Any, Any]:
    return source.choice([(body, "n"), *_places(body)])


def _replace(source: random.Random, body: dict[str, Any]) -> None:
    container, key = _place(source, body)
    container[key] = copy.deepcopy(source.choice(_VALUES))


def _drop(source: random.Random, body: dict[str, Any]) -> None:
    container, key = _place(source, body)
    if isinstance(container, dict):
        container.pop(key, None)
    else:
        del container[key]


def _misspell(source: random.Random, body: dict[str, Any]) -> None:
    container, key = _place(source, body)
    if isinstance(container, dict) and key in container:
        container[source.choice((f"{key}s", key.upper(), "", "a\nb", "x" * 5_000, "\0"))] = container.pop(key)


def _add(source: random.Random, body: dict[str, Any]) -> None:
    names = sorted(
        {*CHAT_UNSERVED, *COMPLETION_UNSERVED, *WITHOUT_EFFECT, *_OPTIONS, "suffix", "logprobs", "extra_body", "messages"}
    )
    body[source.choice(names)] = copy.deepcopy(source.choice((*_VALUES, *_OPTIONS.values())))


def _multiply(source: random.Random, body: dict[str, Any]) -> None:
    container, _ = _place(source, body)
    if isinstance(container, list):
        container *= source.choice((2, 20, 200))


_BODY_FAULTS: Final[tuple[Callable[[random.Random, dict[str, Any]], None], ...]] = (
    *(_replace, _replace, _replace, _drop, _misspell, _add, _add, _multiply),
)


def _json(source: random.Random, body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")


def _damage(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    """Changes, removes or inserts bytes."""
    body = bytearray(request.body)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(body) + 1)
        body[at : at + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
    return FuzzedRequest(request.path, bytes(body[: source.choice((len(body), source.randrange(len(body) + 1)))]))


def _nest(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    opening, closing = source.choice(((b"[", b"]"), (b'{"messages":', b"}"), (b'{"prompt":[', b"]}")))
    depth = source.choice(_DEPTHS)
    return FuzzedRequest(request.path, opening * depth + b"1" + closing * (depth if source.random() < 0.7 else 0))


def _swell(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    """Returns megabytes of one kind, valid except for the last element."""
    tail = source.choice((b"1", b'"x"', b"null", b"[1]", b'{"role":"user","content":"x"}', b"1e5"))
    part, count = source.choice(
        ((b"1,", 500_000), (b'"x",', 200_000), (b"[1],", 200_000), (b'{"role":"user","content":"x"},', 30_000))
    )
    name = source.choice((b"prompt", b"messages", b"stop", b"logit_bias", b"tools"))
    if source.random() < 0.2:
        return FuzzedRequest(request.path, b'{"model":"' + b"x " * source.choice((1_000_000, 3_000_000)) + b'"}')
    return FuzzedRequest(request.path, request.body.removesuffix(b"}") + b',"' + name + b'":[' + part * count + tail + b"]}")


def _re_encode(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    text = request.body.decode("utf-8", "replace")
    body = source.choice(
        (
            *(text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig")),
            *(gzip.compress(request.body, mtime=0), b"", b"null", b'"x"', b"5", b"[]", b"NaN", b"a=b&c=d", request.body * 2),
        )
    )
    return FuzzedRequest(request.path, body)


def _head(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    name = source.choice(("content-type", "content-encoding", "accept", "authorization", "expect", "cookie", "x y", "x", "host"))
    value = source.choice(
        ("", "text/plain", "multipart/form-data", "gzip", "Bearer x", "100-continue", "\xff\xfe", "x" * 3_000, "x" * 100_000, "*/*")
    )
    return FuzzedRequest(request.path, request.body, headers=((name, value),))


def _route(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    method = source.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "post"))
    return FuzzedRequest(source.choice((*_PATHS, request.path)), request.body, method=method)


def _length(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    size = len(request.body)
    lengths = (str(max(size - 5, 0)), "0", "-1", "x", "1e3", f"{size}, {size}", f"{size}, 5", f" {size}", "9" * 30, str(size + 5))
    length = source.choice(lengths)
    waited = length.strip().isdecimal() and int(length) > size
    return FuzzedRequest(request.path, request.body, length=length, complete=not waited)


def _chunk(source: random.Random, request: FuzzedRequest) -> FuzzedRequest:
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(request.body), request.body)
    body = source.choice(
        (whole, whole, b"zz\r\n" + whole, b"-5\r\nx\r\n", b"5;x=y\r\nabcdef\r\n0\r\n\r\n", b"f" * 40 + b"\r\n", whole[:-7])
    )
    return FuzzedRequest(request.path, body, chunked=True, complete=body is whole)


_WIRE_FAULTS: Final[tuple[Callable[[random.Random, FuzzedRequest], FuzzedRequest], ...]] = (
    *(_damage, _damage, _nest, _swell, _re_encode, _head, _route, _length, _chunk),
)
