"""The command `attnstore plan`."""

from __future__ import annotations

import json

import pytest

from attnstore.cli import main

_COMMAND = ["plan", "--model", "llama-3-8b", "--gpu", "h100", "--link", "100g", "--context", "32k", "--hit", "0.9"]


def test_the_text_names_every_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_COMMAND) == 0
    text = capsys.readouterr().out
    for words in (
        "131,072 B a token",
        "268x",
        "break-even",
        "recompute",
        "fetch",
        "both",
        "in HBM",
        "attended in place",
        "<- fastest",
    ):
        assert words in text


def test_the_json_holds_question_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_COMMAND, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["model"], plan["gpu"], plan["link"], plan["context_tokens"]) == ("llama-3-8b", "h100", "100g", 32_768)
    assert plan["hit_bytes"] == plan["hit_tokens"] * plan["kv_token_bytes"]
    assert plan["first_token"]["best"] == "both"


def test_what_is_infinite_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--link", "inf@60000ms", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["break_even_gb_per_s"] is None
    assert plan["link_gb_per_s"] is None


def test_several_gpus_are_said_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "8xH800", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["gpu"], plan["gpus"]) == ("h800", 8)


def test_the_list_names_models_gpus_and_links(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    text = capsys.readouterr().out
    for name in ("smollm2-135m", "llama-2-70b", "mi300x", "6g-vision"):
        assert name in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt-9"], "gpt-9"),
        (["--gpu", "abacus"], "abacus"),
        (["--gpu", "0xh100"], "--gpu: '0' is not a whole number"),
        (["--link", "string"], "is no link"),
        (["--context", "much"], "is not a number of tokens"),
        (["--context", "0"], "--context: '0' is not a number of tokens"),
        (["--hit", "2"], "--hit: '2' is not a number from 0 to 1"),
        (["--hit", "nan"], "--hit: 'nan' is not a number from 0 to 1"),
        (["--context", "infk"], "is not a number of tokens"),
    ],
)
def test_a_bad_option_ends_with_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
