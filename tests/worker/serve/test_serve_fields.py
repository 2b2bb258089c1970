"""Fields of requests: each is served, refused by its name, or cannot change the answer."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from pydantic import ValidationError

from attnstore.limits import HTTP_BODY_BRACKETS_MAX
from attnstore_worker.serve.fields import WITHOUT_EFFECT
from attnstore_worker.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, InvalidRequest, parse_request

BASES: dict[type[GenerationRequest], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "x"},
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}
ASKED = {
    "frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1, "length_penalty": 0.5, "min_p": 0.05,
    "logit_bias": {"5": -100}, "logits_processors": ["x"], "allowed_token_ids": [5], "bad_words": ["x"], "use_beam_search": True,
    "best_of": 2, "min_tokens": 5, "stop_token_ids": [5], "include_stop_str_in_output": True, "thinking_token_budget": 5,
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}, "guided_json": {}, "guided_regex": "x",
    "guided_choice": ["a"], "guided_grammar": "x", "guided_decoding_backend": "x", "guided_whitespace_pattern": "x",
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "modalities": ["audio"], "audio": {}, "prediction": {},
    "verbosity": "low", "reasoning_effort": "low", "web_search_options": {}, "echo": True, "top_logprobs": 2, "logprobs": 3,
    "prompt_logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "tools": [{}], "tool_choice": "required",
    "functions": [{}], "function_call": {"name": "x"}, "truncate_prompt_tokens": 5, "kv_transfer_params": {"x": 1},
    "vllm_xargs": {"x": 1}, "mm_processor_kwargs": {"x": 1}, "documents": [{}], "prompt_embeds": "x",
}  # fmt: skip
"""For each field a value that requests something."""
ASKED_OF_COMPLETIONS = {"suffix": "x", "add_special_tokens": False, "logprobs": 0, "max_completion_tokens": 5}
ASKED_OF_CHATS = {
    "add_special_tokens": True, "logprobs": True, "add_generation_prompt": False, "continue_final_message": True,
    "chat_template": "x", "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip


def parsed(kind: type[GenerationRequest], **fields: object) -> GenerationRequest:
    return parse_request(kind, json.dumps({**BASES[kind], **fields}).encode())


def served(request: GenerationRequest) -> dict[str, object]:
    """Returns the parsed request."""
    return {name: getattr(request, name) for name in type(request).model_fields}


@pytest.mark.parametrize(
    ("kind", "asked"), [(CompletionRequest, {**ASKED, **ASKED_OF_COMPLETIONS}), (ChatRequest, {**ASKED, **ASKED_OF_CHATS})]
)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(
    kind: type[GenerationRequest], asked: dict[str, object]
) -> None:
    for name, value in asked.items():
        with pytest.raises(InvalidRequest, match=name) as refused:
            parsed(kind, **{name: value})
        assert refused.value.param == name
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", BASES)
def test_a_value_that_asks_for_nothing_is_accepted(kind: type[GenerationRequest]) -> None:
    plain = served(parsed(kind))
    for name, neutral in kind.unserved.items():
        for value in (None, *neutral):
            assert served(parsed(kind, **{name: value})) == plain
    assert served(parsed(kind, frequency_penalty=0.0, repetition_penalty=1.0)) == plain
    for name in ("frequency_penalty", "top_logprobs", "min_tokens"):
        with pytest.raises(InvalidRequest, match=name):
            parsed(kind, **{name: False})


@pytest.mark.parametrize("kind", BASES)
def test_a_field_that_cannot_change_the_answer_may_say_anything(kind: type[GenerationRequest]) -> None:
    for value in ("x", True, {"a": [1]}, None, []):
        assert served(parsed(kind, **dict.fromkeys(WITHOUT_EFFECT, value))) == served(parsed(kind))


@pytest.mark.parametrize("kind", BASES)
def test_null_says_that_a_field_is_not_given(kind: type[GenerationRequest]) -> None:
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert served(parsed(kind, **dict.fromkeys(optional))) == served(parsed(kind))
    for name in set(kind.model_fields) - set(optional):
        with pytest.raises(InvalidRequest, match=f"{name}.*: Input should be"):
            parsed(kind, **{name: None})


@pytest.mark.parametrize("kind", BASES)
def test_a_name_that_nobody_knows_is_refused_in_one_line(kind: type[GenerationRequest]) -> None:
    for name in ("temprature", "extra_body", "a\nb", "x" * 10_000, ""):
        with pytest.raises(InvalidRequest, match="is no field of this request") as refused:
            parsed(kind, **{name: 1})
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 200
    with pytest.raises(InvalidRequest, match="stream_options: 'include_usages' is no field of it"):
        parsed(kind, stream_options={"include_usages": True})


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (CompletionRequest, of_completions.CompletionCreateParamsBase),
        (ChatRequest, of_chats.CompletionCreateParamsBase),
    ],
)
def test_each_parameter_of_openais_client_is_known(kind: type[GenerationRequest], params: type) -> None:
    names = set(get_type_hints(params)) | {"stream"}
    assert len(names) > 15
    assert names <= kind.model_fields.keys() | kind.unserved.keys() | WITHOUT_EFFECT


@pytest.mark.parametrize("kind", BASES)
def test_no_field_is_in_two_lists(kind: type[GenerationRequest]) -> None:
    assert not kind.model_fields.keys() & kind.unserved.keys()
    assert not (kind.model_fields.keys() | kind.unserved.keys()) & WITHOUT_EFFECT


@pytest.mark.parametrize("salt", ["", 5, "x" * 257, ["x"]])
def test_a_salt_is_a_short_text(salt: object) -> None:
    with pytest.raises(InvalidRequest, match="cache_salt"):
        parsed(CompletionRequest, cache_salt=salt)


def test_null_in_the_arguments_of_a_call_is_kept() -> None:
    call = {"function": {"name": "where", "arguments": '{"city": null}'}}
    request = parse_request(
        ChatRequest, json.dumps({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()
    )
    message = request.messages[0].as_template_input()
    assert message == {"role": "assistant", "tool_calls": [{"function": {"name": "where", "arguments": {"city": None}}}]}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    "field",
    [
        '"stop": [%s]', '"prompt": [%s]', '"prompt": [[%s]]', '"messages": [%s]', '"messages": [{"role": "user", "content": [%s]}]',
        '"messages": [{"role": "assistant", "tool_calls": [%s]}]',
    ],
)  # fmt: skip
def test_a_body_has_as_few_errors_as_it_has_ways_to_be_read(kind: type[GenerationRequest], field: str) -> None:
    wrong = ["{}"] * 1_000
    with pytest.raises(ValidationError) as refused:
        kind.model_validate_json("{" + field % ",".join(wrong) + "}")
    assert refused.value.error_count() < 10


@pytest.mark.parametrize("within", ["{%s}", '{"stream_options": {%s}}', '{"messages": [{"role": "user", %s}]}'])
def test_names_that_nobody_knows_are_one_error(within: str) -> None:
    body = within % ",".join(f'"k{number}": 1' for number in range(1_000))
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate_json(body)
    assert refused.value.error_count() < 10


def test_a_body_of_very_many_lists_is_refused_unread() -> None:
    body = b'{"model": "m", "prompt": [' + b"[1]," * HTTP_BODY_BRACKETS_MAX + b"[1]]}"
    with pytest.raises(InvalidRequest, match="lists and objects"):
        parse_request(CompletionRequest, body)
