"""Authentication of the endpoint's callers, and time limits of clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from attnstore.errors import InvalidArgument
from attnstore.worker_status import worker_statuses
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions
from attnstore_worker.explain import decisions_of
from attnstore_worker.model import LoadedModel
from attnstore_worker.serve import Endpoint, create_app
from attnstore_worker.serve.server import server_config

TOKENS = {"token-of-ada": "ada", "token-of-bob": "bob"}
WAIT_S = 30.0


@asynccontextmanager
async def served(model: LoadedModel, tokens: dict[str, str], priority_callers: Collection[str] = ()) -> AsyncIterator[str]:
    engine = Engine(model, EngineOptions(pool_bytes=60 * model.layout(16).page_bytes, chunk_tokens=64))
    with engine, AsyncEngine(engine) as front, socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(server_config(create_app(front, model, tokens, priority_callers)))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


@pytest.fixture
async def url(tiny: LoadedModel) -> AsyncIterator[str]:
    """An endpoint that requires a token."""
    async with served(tiny, TOKENS) as url:
        yield url


@pytest.fixture
async def open_url(tiny: LoadedModel) -> AsyncIterator[str]:
    """An endpoint without tokens."""
    async with served(tiny, {}) as url:
        yield url


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer token-of-ad", "bearer token-of-ada", "token-of-ada", "Basic x"])
async def test_without_a_token_nothing_is_answered_but_health_and_metrics(url: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with httpx2.AsyncClient(base_url=url, headers=headers) as http:
        for method, path in (
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/x"),
            ("GET", "/planner"),
            ("GET", "/nowhere"),
            ("GET", "/health/"),
            ("GET", "//metrics"),
        ):
            answer = await http.request(method, path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert (await http.get("/health")).status_code == 200
        metrics = await http.get("/metrics")
        assert metrics.status_code == 200
        assert 'attnstore_worker_requests_total{route="completions",status="401"} 1.0' in metrics.text


async def test_each_token_opens_the_endpoint_as_openais_api_key(url: str, tiny: LoadedModel) -> None:
    for token in TOKENS:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as client:
            answer = await client.completions.create(model=tiny.name, prompt=[5, 6, 7], max_tokens=2)
            assert answer.usage is not None
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_status_and_explain_present_the_token(url: str) -> None:
    for token, answers in (("token-of-bob", True), (None, False), ("other", False)):
        (status,) = await worker_statuses([url], 5_000, token=token)
        assert (status.error is None) == answers
        if answers:
            assert await asyncio.to_thread(decisions_of, url, 5, None, token) == []
        else:
            assert "401" in str(status.error)
            with pytest.raises(InvalidArgument, match="401"):
                await asyncio.to_thread(decisions_of, url, 5, None, token)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_priority_is_for_callers_that_are_allowed_to_set_one(tiny: LoadedModel, path: str) -> None:
    body = {"model": tiny.name, "max_tokens": 1}
    body |= {"prompt": [5]} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}

    async def statuses(url: str, token: str | None) -> list[int]:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers) as http:
            answers = [await http.post(path, json={**body, **field}) for field in ({}, {"priority": 0}, {"priority": 5})]
        if answers[-1].status_code == 403:
            error = answers[-1].json()["error"]
            assert (error["param"], error["code"]) == ("priority", "permission_denied")
            assert "--allow-priority" in error["message"]
        return [answer.status_code for answer in answers]

    async with served(tiny, TOKENS, {"ada"}) as url:
        assert await statuses(url, "token-of-ada") == [200, 200, 200]
        assert await statuses(url, "token-of-bob") == [200, 200, 403]
    async with served(tiny, {}) as url:
        assert await statuses(url, None) == [200, 200, 403]
    async with served(tiny, {}, {"default"}) as url:
        assert await statuses(url, None) == [200, 200, 200]


def test_callers_that_may_set_priorities_are_named(tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text('ada = "token-of-ada"\nbob = "token-of-bob"\n')
    assert endpoint("127.0.0.1", tokens_file=tokens_file).priority_callers == frozenset()
    assert endpoint("127.0.0.1", tokens_file=tokens_file, allow_priority=["ada"]).priority_callers == {"ada"}
    assert endpoint("127.0.0.1", token="t", allow_priority=["default"]).priority_callers == {"default"}
    assert endpoint("127.0.0.1", allow_priority=["default"]).priority_callers == {"default"}
    for options in ({"tokens_file": tokens_file}, {"token": "t"}, {}):
        with pytest.raises(InvalidArgument, match="--allow-priority carol: no caller has that name; there is"):
            endpoint("127.0.0.1", allow_priority=["carol"], **options)


def endpoint(host: str, **options: Any) -> Endpoint:
    return Endpoint.create(host, 0, **{"token": None, "tokens_file": None, "insecure": False, **options})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fd00::1", "worker.example.org"])
def test_a_public_address_needs_a_token_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--token") as caught:
        endpoint(host)
    assert f"--host {host}" in str(caught.value)
    assert "--insecure" in str(caught.value)
    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text('ada = "token-of-ada"\n')
    assert endpoint(host, token="t").tokens == {"t": "default"}
    assert endpoint(host, tokens_file=tokens_file).tokens == {"token-of-ada": "ada"}
    assert endpoint(host, insecure=True).tokens == {}


def test_a_loopback_address_needs_none_and_bad_tokens_are_refused(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert endpoint(host).tokens == {}
    for options in ({"token": "a b"}, {"token": "x", "tokens_file": tmp_path / "f"}, {"tokens_file": tmp_path / "absent"}):
        with pytest.raises(InvalidArgument, match="--token"):
            endpoint("127.0.0.1", **options)
    assert "s3cret" not in repr(endpoint("127.0.0.1", token="s3cret"))


def test_the_command_refuses_a_public_address_before_it_loads_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no model, as would be seen if it were read")
    command = [sys.executable, "-m", "attnstore_worker.cli", "serve", "--host", "0.0.0.0", "--model", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 4)
    assert result.returncode == 2
    assert "--host 0.0.0.0 is reachable from other machines" in result.stderr


async def raw(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def trickle(writer: asyncio.StreamWriter, byte: bytes) -> None:
    """Sends a byte now and then, until the other end closes the connection."""
    with contextlib.suppress(OSError):
        while True:
            writer.write(byte)
            await writer.drain()
            await asyncio.sleep(0.02)


async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, byte: bytes) -> bytes:
    """Returns what a slowly sending client receives until its connection ends."""
    trickling, answer = asyncio.ensure_future(trickle(writer, byte)), b""
    try:
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                while part := await reader.read(1 << 16):
                    answer += part
        return answer
    finally:
        trickling.cancel()
        writer.close()


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx: "])
async def test_a_head_that_does_not_come_ends_the_connection(url: str, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.serve.connection.HTTP_HEAD_MS_MAX", 1_000)
    reader, writer = await raw(url)
    writer.write(head)
    assert await ended(reader, writer, b"a" if head else b"") == b""


async def test_a_second_head_has_no_more_time_than_the_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.serve.connection.HTTP_HEAD_MS_MAX", 1_000)
    reader, writer = await raw(url)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\nx: ")
    assert (await ended(reader, writer, b"a")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("length", [b"content-length: 1000000", b"transfer-encoding: chunked"])
async def test_a_body_that_trickles_is_answered_408(open_url: str, length: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.serve.app.HTTP_BODY_MS_MAX", 300)
    monkeypatch.setattr("attnstore_worker.serve.connection.HTTP_HEAD_MS_MAX", 1_000)
    reader, writer = await raw(open_url)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
    answer = await ended(reader, writer, b"1\r\n \r\n" if length.endswith(b"chunked") else b" ")
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_the_body_of_a_refused_request_holds_no_connection(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.serve.connection.HTTP_HEAD_MS_MAX", 1_000)
    reader, writer = await raw(url)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    assert (await ended(reader, writer, b" ")).startswith(b"HTTP/1.1 401")


async def test_a_client_that_takes_nothing_of_its_answer_loses_its_connection(
    open_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnstore_worker.serve.connection.HTTP_STALL_MS_MAX", 300)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        host, port = open_url.removeprefix("http://").split(":")
        await loop.sock_connect(client, (host, int(port)))
        # Pipelined requests whose answers the client does not read: more than all buffers hold.
        request = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"

        async def ask_for_ever() -> None:
            while True:
                await loop.sock_sendall(client, request * 100)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(ask_for_ever(), WAIT_S)


async def test_a_slow_answer_is_no_stall(open_url: str, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD", "STALL"):
        monkeypatch.setattr(f"attnstore_worker.serve.connection.HTTP_{name}_MS_MAX", 50)
    async with openai.AsyncOpenAI(base_url=f"{open_url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(
            model=tiny.name, prompt=[5, 6, 7], max_tokens=200, extra_body={"ignore_eos": True}, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 200
