"""Prompts of a model whose tokenizer adds a BOS and whose chat template writes one, as with most models."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument
from attnstore_worker.actions import _prompt_ids
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.prompts import chat_tokens, text_tokens
from attnstore_worker.serve import create_app

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' and not message.tool_call_id %}{{ raise_exception('a tool answers\n a call') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def bos_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bos"
    shutil.copytree(tiny_folder, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def bos_model(bos_folder: Path) -> LoadedModel:
    return load_model(bos_folder, DType.FP32)


def reference(model: LoadedModel, messages: list[dict[str, Any]]) -> list[int]:
    """Returns the tokens that transformers itself makes of a conversation."""
    token_ids: list[int] = model.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return token_ids


def test_a_text_has_the_bos_that_the_tokenizer_adds(bos_model: LoadedModel) -> None:
    token_ids = text_tokens(bos_model.tokenizer, "Hello")
    assert token_ids[0] == bos_model.tokenizer.bos_token_id
    assert token_ids.count(bos_model.tokenizer.bos_token_id) == 1


def test_a_conversation_has_the_bos_of_its_template_and_no_other(bos_model: LoadedModel) -> None:
    token_ids = chat_tokens(bos_model.tokenizer, HELLO)
    assert token_ids == reference(bos_model, HELLO)
    assert token_ids.count(bos_model.tokenizer.bos_token_id) == 1


def test_the_command_wraps_a_message_in_the_template_alone(bos_model: LoadedModel) -> None:
    chat = argparse.Namespace(chat=True, prompt_tokens=None)
    assert _prompt_ids(bos_model, "Hello", chat) == reference(bos_model, HELLO)
    text = argparse.Namespace(chat=False, prompt_tokens=None)
    assert _prompt_ids(bos_model, "Hello", text) == bos_model.tokenizer("Hello").input_ids


async def test_the_endpoint_wraps_a_conversation_in_the_template_alone(bos_model: LoadedModel) -> None:
    pool = EngineOptions(pool_bytes=8 * bos_model.layout(16).page_bytes, chunk_tokens=64)
    with Engine(bos_model, pool) as engine, AsyncEngine(engine) as front:
        transport = httpx2.ASGITransport(app=create_app(front, bos_model))
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
            for path, field, expected in (
                ("/v1/chat/completions", {"messages": HELLO}, reference(bos_model, HELLO)),
                ("/v1/completions", {"prompt": "Hello"}, bos_model.tokenizer("Hello").input_ids),
            ):
                answer = await http.post(path, json={"model": bos_model.name, "max_tokens": 1, **field})
                assert answer.json()["usage"]["prompt_tokens"] == len(expected)


def test_what_a_template_raises_is_told_in_one_line(bos_model: LoadedModel) -> None:
    with pytest.raises(InvalidArgument, match="a tool answers a call"):
        chat_tokens(bos_model.tokenizer, [{"role": "tool", "content": "Rome"}])
    for call in ({"city": "Rome"}, {}):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "where", "arguments": call}}]}
        assert chat_tokens(bos_model.tokenizer, [message]) == reference(bos_model, [message])
    with pytest.raises(InvalidArgument, match="refuses the conversation"):
        chat_tokens(bos_model.tokenizer, [{"role": "assistant", "tool_calls": 5}])


def test_a_call_that_the_template_would_leave_out_is_refused(bos_model: LoadedModel, tiny: LoadedModel) -> None:
    calls = [{"function": {"name": "where", "arguments": {"city": "Rome"}}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert chat_tokens(bos_model.tokenizer, [message])
    with pytest.raises(InvalidArgument, match="does not read tool_calls"):
        chat_tokens(tiny.tokenizer, [message])
    with pytest.raises(InvalidArgument, match="does not read function_call"):
        chat_tokens(bos_model.tokenizer, [{"role": "assistant", "content": "", "function_call": calls[0]["function"]}])
