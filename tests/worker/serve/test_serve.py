"""The endpoint with OpenAI's own client, and with clients that send invalid requests."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn

from attnstore.limits import HTTP_BODY_BYTES_MAX
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions, SamplingParams
from attnstore_worker.engine.runner import Drawn
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.model import LoadedModel
from attnstore_worker.serve import create_app
from attnstore_worker.serve.formats import Json

WAIT_S = 30.0
GREEDY: dict[str, Any] = {"temperature": 0.0}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.name }} {{ message.tool_call_id }}: {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)


@pytest.fixture
def engine(tiny: LoadedModel) -> Engine:
    options = EngineOptions(pool_bytes=60 * tiny.layout(16).page_bytes, chunk_tokens=64, sequences_max=4, waiting_max=8)
    return Engine(tiny, options)


@pytest.fixture
async def url(engine: Engine, tiny: LoadedModel) -> AsyncIterator[str]:
    """A real server on a real socket; afterwards no block is held, whatever the test did."""
    with engine, AsyncEngine(engine) as front:
        server = uvicorn.Server(uvicorn.Config(create_app(front, tiny), port=0, log_level="error", lifespan="off"))
        serving = asyncio.ensure_future(server.serve())
        await eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        await eventually(lambda: front.snapshot.cache.pool.held == 0)
        server.should_exit = True
        await serving
    engine.check()


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url) as client:
        yield client


async def eventually(condition: Callable[[], bool]) -> None:
    """Polls, because the server makes the condition true; the time that takes is not tested."""
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.005)


def expected_text(model: LoadedModel, token_ids: list[int], tokens: int) -> str:
    with Engine(model, EngineOptions(pool_bytes=1 << 20, chunk_tokens=64)) as engine:
        sequence = engine.generate(token_ids, SamplingParams(max_tokens=tokens, stop_token_ids=model.stop_token_ids))
    text: str = model.tokenizer.decode(sequence.generated, skip_special_tokens=True)
    return text


def template_tokens(model: LoadedModel, messages: list[dict[str, Any]]) -> list[int]:
    """Returns the tokens that transformers makes of a conversation."""
    token_ids: list[int] = model.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return token_ids


class TestOpenAIClient:
    """The package `openai`, unchanged."""

    async def test_a_completion_is_what_the_engine_generates(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        answer = await client.completions.create(model=tiny.name, prompt="Once upon a time", max_tokens=12, **GREEDY)
        token_ids = tiny.tokenizer("Once upon a time").input_ids
        assert answer.choices[0].text == expected_text(tiny, token_ids, 12)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(token_ids), 12)

    async def test_many_prompts_and_choices_come_in_order(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        prompts = [[5, 6, 7], [8, 9, 10]]
        answer = await client.completions.create(model=tiny.name, prompt=prompts, n=2, max_tokens=6, **GREEDY)
        expected = [expected_text(tiny, prompt, 6) for prompt in prompts for _ in range(2)]
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 24)

    async def test_a_stream_joins_to_the_whole_answer(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        text, usage, reasons = "", None, []
        async for chunk in await client.completions.create(
            model=tiny.name, prompt=[5, 6, 7], max_tokens=10, stream=True, stream_options={"include_usage": True}, **GREEDY
        ):
            text += "".join(choice.text for choice in chunk.choices)
            reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            usage = chunk.usage or usage
        assert text == expected_text(tiny, [5, 6, 7], 10)
        assert reasons == ["length"]
        assert usage is not None
        assert usage.total_tokens == 13

    async def test_a_conversation_is_wrapped_in_the_chat_template(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
        expected = expected_text(tiny, template_tokens(tiny, messages), 8)
        whole = await client.chat.completions.create(model=tiny.name, messages=messages, max_tokens=8, **GREEDY)
        assert whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content == expected
        chunks: Any = await client.chat.completions.create(
            model=tiny.name, messages=messages, max_completion_tokens=8, stream=True, **GREEDY
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == expected

    async def test_equal_seeds_draw_equal_texts_and_choices_differ(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        async def draw() -> list[str]:
            answer = await client.completions.create(model=tiny.name, prompt=[5, 6, 7], n=2, max_tokens=10, seed=3, top_p=0.9)
            return [choice.text for choice in answer.choices]

        first = await draw()
        assert first == await draw()
        assert first[0] != first[1]

    async def test_a_stop_string_ends_the_answer(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        whole = expected_text(tiny, [5, 6, 7], 20)
        stop = whole[10:13]
        answer = await client.completions.create(model=tiny.name, prompt=[5, 6, 7], max_tokens=20, stop=[stop], **GREEDY)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"

    async def test_the_model_is_listed_and_others_are_unknown(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        assert [model.id async for model in client.models.list()] == [tiny.name]
        assert (await client.models.retrieve(tiny.name)).id == tiny.name
        with pytest.raises(openai.NotFoundError, match="not served here"):
            await client.completions.create(model="another", prompt="x")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another")

    async def test_more_than_the_queue_holds_is_refused_as_overload(self, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.completions.create(model=tiny.name, prompt=[5, 6, 7], n=64, max_tokens=400)
        assert refused.value.status_code == 503
        assert refused.value.code == "overloaded"
        assert await client.completions.create(model=tiny.name, prompt=[5, 6, 7], max_tokens=1)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1 << 40]}, None),
        ({"prompt": [5] * 600}, None),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [5], "max_tokens": 10**12}, "max_tokens"),
        ({"prompt": [5], "max_tokens": "ten"}, "max_tokens"),
        ({"prompt": [5], "temperature": -1}, "temperature"),
        ({"prompt": [5], "temperature": 1e300}, "temperature"),
        ({"prompt": [5], "top_p": 0}, "top_p"),
        ({"prompt": [5], "top_k": 0}, "top_k"),
        ({"prompt": [5], "n": 10**9}, "n"),
        ({"prompt": [[5]] * 33, "n": 2}, "n"),
        ({"prompt": [5], "seed": -1}, "seed"),
        ({"prompt": [5], "stop": [""]}, "stop"),
        ({"prompt": [5], "stop": ["x"] * 17}, "stop"),
        ({"prompt": [5], "logprobs": 3}, "logprobs"),
        ({"prompt": [5], "frequency_penalty": 1.0}, "frequency_penalty"),
        ({"prompt": [5], "stream": "yes"}, "stream"),
        ({}, "prompt"),
    ],
)
async def test_a_wrong_parameter_is_named_in_an_error_body(
    http: httpx2.AsyncClient, tiny: LoadedModel, wrong: dict[str, object], param: str | None
) -> None:
    answer = await http.post("/v1/completions", json={"model": tiny.name, **wrong})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert (error["param"] or "").split(".")[0] == (param or "")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN', b"[" * 100_000])
async def test_a_body_that_is_no_request_is_refused(http: httpx2.AsyncClient, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = await http.post(path, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "audio": None,
                "tool_calls": None,
                "name": "x",
            }
        ],
        [{"role": "function", "name": "where", "content": "Rome"}, {"role": "tool", "tool_call_id": "1", "content": "Rome"}],
        [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]}],
        [{"role": "assistant", "content": "", "tool_calls": [], "reasoning": "hm", "reasoning_content": "hm"}],
    ],
)
async def test_a_conversation_reaches_the_template_as_it_was_sent(
    http: httpx2.AsyncClient, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", TEMPLATE)
    body = {"model": tiny.name, "messages": messages, "max_tokens": 4, "ignore_eos": True, **GREEDY}
    answer = await http.post("/v1/chat/completions", json=body)
    as_read = [{**each, "role": each["role"].replace("developer", "system")} for each in messages]
    for each in as_read:
        if isinstance(each["content"], list):
            each["content"] = "Be short."
    assert answer.json()["choices"][0]["message"]["content"] == expected_text(tiny, template_tokens(tiny, as_read), 4)


async def test_a_call_of_a_tool_reaches_the_template_with_its_arguments_as_an_object(
    http: httpx2.AsyncClient, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", TEMPLATE)
    call = {"id": "1", "type": "function", "function": {"name": "where", "arguments": '{"city": "Rome"}'}}
    body = {"model": tiny.name, "max_tokens": 4, "ignore_eos": True, **GREEDY}
    for content in ({"content": None}, {}):
        messages = [{"role": "assistant", **content, "tool_calls": [call]}]
        answer = await http.post("/v1/chat/completions", json={**body, "messages": messages})
        as_object = {**call, "function": {"name": "where", "arguments": {"city": "Rome"}}}
        expected = template_tokens(tiny, [{"role": "assistant", "tool_calls": [as_object]}])
        assert answer.json()["choices"][0]["message"]["content"] == expected_text(tiny, expected, 4)
    for arguments in ("{", "5", 5, None):
        wrong = {**call, "function": {"name": "where", "arguments": arguments}}
        answer = await http.post("/v1/chat/completions", json={**body, "messages": [{"role": "assistant", "tool_calls": [wrong]}]})
        assert answer.status_code == 400
        assert "arguments" in answer.json()["error"]["param"]


async def test_a_template_that_refuses_a_conversation_is_told_in_its_words(
    http: httpx2.AsyncClient, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template, words in (("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 / 0 }}", "zero")):
        monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
        answer = await http.post("/v1/chat/completions", json={"model": tiny.name, "messages": [{"role": "user", "content": "x"}]})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "king", "content": "x"}],
        [{"role": "user", "content": 5}],
        "x",
        [{"role": "user", "contents": "x"}],
    ],
)
async def test_a_malformed_conversation_is_refused(http: httpx2.AsyncClient, tiny: LoadedModel, messages: object) -> None:
    answer = await http.post("/v1/chat/completions", json={"model": tiny.name, "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


async def test_what_is_not_there_and_what_is_too_large_have_error_bodies_as_well(http: httpx2.AsyncClient) -> None:
    for answer, status in (
        (await http.get("/v1/nothing"), 404),
        (await http.get("/v1/completions"), 405),
        (await http.post("/v1/completions", content=b" " * (HTTP_BODY_BYTES_MAX + 1)), 413),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_request_whose_logits_are_not_finite_ends_alone(
    engine: Engine, http: httpx2.AsyncClient, tiny: LoadedModel, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, as a stream, and with several choices; concurrent and later requests are answered."""
    spoil_rows_of(engine, monkeypatch, first_token=9)

    def body(first: int, **more: object) -> Json:
        return {
            "model": tiny.name,
            "prompt": [first, 6, 7],
            "max_tokens": 20,
            "temperature": temperature,
            "seed": 1,
            "ignore_eos": True,
            **more,
        }

    post = functools.partial(http.post, "/v1/completions")
    before = (await post(json=body(5))).json()["choices"]
    for _ in range(2):
        spoiled, several, streamed, beside = await asyncio.gather(
            post(json=body(9)), post(json=body(9, n=3)), post(json=body(9, stream=True)), post(json=body(5))
        )
        for answer in (spoiled, several):
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "logits_not_finite"
            assert answer.json()["error"]["type"] == "server_error"
        events = streamed.text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "logits_not_finite"
        assert beside.json()["choices"] == before
    assert (await http.get("/health")).status_code == 200
    assert engine.batching().failures >= 6, "one of each request; its others are cancelled"


def spoil_rows_of(engine: Engine, monkeypatch: pytest.MonkeyPatch, first_token: int) -> None:
    """Makes the third token of every sequence with this beginning be drawn from NaN."""
    run, compute = engine._runner.run, engine.model.decoder.logits
    giving: list[Chunk] = []

    def noted(chunks: list[Chunk], *args: Any, **kwargs: Any) -> Drawn:
        giving[:] = [chunk for chunk in chunks if chunk.gives_token]
        return run(chunks, *args, **kwargs)

    def spoiled(*args: Any) -> torch.Tensor:
        logits = compute(*args).clone()
        for row, chunk in zip(logits, giving, strict=True):
            if chunk.sequence.token_ids[0] == first_token and len(chunk.sequence.generated) == 2:
                row[:] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "run", noted)
    monkeypatch.setattr(engine.model.decoder, "logits", spoiled)


async def test_a_count_of_decisions_that_is_no_number_is_refused(http: httpx2.AsyncClient) -> None:
    for last in ("x", "-5", "", "9" * 5_000, "1.5", "\u0663"):
        answer = await http.get("/planner", params={"last": last})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "last"
    assert (await http.get("/planner")).status_code == 200


async def test_a_client_that_sends_too_much_reads_why_it_was_refused(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for _ in range(5):
        reader, writer = await asyncio.open_connection(host, int(port))
        size = 4 * HTTP_BODY_BYTES_MAX
        writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n".encode())
        writer.write(bytes(size))
        await writer.drain()
        assert (await reader.read()).startswith(b"HTTP/1.1 413")
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_leaves_nothing_running(url: str, engine: Engine, tiny: LoadedModel, stream: bool) -> None:
    body = json.dumps({"model": tiny.name, "prompt": [5, 6, 7], "max_tokens": 500, "stream": stream, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write((head + body).encode())
    await eventually(lambda: engine.batching().tokens_generated > 3)
    writer.close()
    await eventually(lambda: engine.idle)
    assert engine.batching().tokens_generated < 400, "it was cancelled, not finished"


async def test_health_and_metrics_tell_how_it_goes(http: httpx2.AsyncClient, client: openai.AsyncOpenAI, tiny: LoadedModel) -> None:
    assert (await http.get("/health")).status_code == 200
    await client.completions.create(model=tiny.name, prompt=[5, 6, 7], max_tokens=4, **GREEDY)
    text = (await http.get("/metrics")).text
    assert 'attnstore_worker_requests_total{route="completions",status="200"} 1.0' in text
    assert "attnstore_worker_tokens_generated_total 4.0" in text
    assert "attnstore_worker_sequences_running 0.0" in text
    assert 'attnstore_worker_tier_queried_tokens_total{tier="hbm"} 0.0' in text
    assert 'attnstore_worker_tier_evicted_blocks_total{tier="host"} 0.0' in text
    assert "attnstore_worker_ttft_seconds_count 1.0" in text
