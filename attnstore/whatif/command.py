"""The command `attnstore plan`: its options, its text and its JSON."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict
from typing import Any

from attnstore.command_line import say
from attnstore.errors import InvalidArgument
from attnstore.limits import BLOCK_TOKENS_MAX, CONTEXT_TOKENS_MAX, GPUS_MAX, MEMORY_GB_PER_S_MAX
from attnstore.links import PROFILES, parse_link
from attnstore.option_types import InvalidValue, Number, Parsed, Whole
from attnstore.secrecy import shown
from attnstore.whatif.estimate import Plan, Question, answer
from attnstore.whatif.hardware import GPUS, Gpu, find_gpu
from attnstore.whatif.model import load_model, model_names

_UNITS = {"k": 1 << 10, "m": 1 << 20}
_TOKENS = Number(0, CONTEXT_TOKENS_MAX)
_GPUS = Whole(1, GPUS_MAX)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `attnstore plan`."""
    add = parser.add_argument
    add(
        "--model",
        type=Parsed(load_model),
        default="llama-3-8b",
        metavar="NAME",
        help="%(default)s, another name, or the path of a config.json; see --list",
    )
    add(
        "--gpu",
        type=Parsed(_gpus),
        default="h100",
        metavar="[Nx]NAME",
        help="GPU, or N GPUs that share the work evenly, as in 8xh800 [default: %(default)s]",
    )
    add(
        "--link",
        type=Parsed(parse_link),
        default="100g",
        metavar="LINK",
        help="profile, or RATE[/UP][@RTTms] as in 10g@1ms [default: %(default)s]",
    )
    add("--context", type=Parsed(_tokens), default="32k", metavar="TOKENS", help="tokens; k is 1,024 [default: %(default)s]")
    add("--hit", type=Number(0, 1), default=0.9, metavar="SHARE", help="share of the context in the store [default: %(default)s]")
    add(
        "--mfu",
        type=Number(0, 1, above=True),
        default=1.0,
        metavar="SHARE",
        help="share of the peak that prefill reaches [default: %(default)s]",
    )
    add(
        "--node-gb-per-s",
        type=Number(0, MEMORY_GB_PER_S_MAX, above=True),
        default=300.0,
        metavar="GB/S",
        help="a node's memory bandwidth, for attend [default: %(default)s]",
    )
    add(
        "--block-tokens",
        type=Whole(1, BLOCK_TOKENS_MAX),
        default=16,
        metavar="N",
        help="tokens in a block [default: %(default)s]",
    )
    add("--json", action="store_true", help="print JSON")
    add("--list", action="store_true", help="print the known models, GPUs and links, and exit")


def run_plan(arguments: argparse.Namespace) -> None:
    """Prints the plan. Raises `InvalidArgument` for options that do not go together."""
    if arguments.list:
        say(_lists())
        return
    gpus, gpu = arguments.gpu
    question = Question(
        model=arguments.model,
        gpu=gpu,
        link=arguments.link,
        context_tokens=arguments.context,
        hit=arguments.hit,
        gpus=gpus,
        mfu=arguments.mfu,
        node_gb_per_s=arguments.node_gb_per_s,
        block_tokens=arguments.block_tokens,
    )
    plan = answer(question)
    say(json.dumps(as_json(question, plan), indent=1, allow_nan=False) if arguments.json else as_text(question, plan))


def as_json(question: Question, plan: Plan) -> dict[str, Any]:
    """Returns question and answer; infinite values are null."""
    fields = asdict(plan)
    fields["first_token"]["best"] = plan.first_token.best
    asked = {
        "model": question.model.name,
        "gpu": question.gpu.name,
        "gpus": question.gpus,
        "link": question.link.name,
        "link_gb_per_s": question.link.down_gb_per_s,
        "link_rtt_ms": question.link.rtt_ms,
        "context_tokens": question.context_tokens,
        "hit": question.hit,
        "mfu": question.mfu,
        "node_gb_per_s": question.node_gb_per_s,
        "block_tokens": question.block_tokens,
    }
    return {name: None if value == math.inf else value for name, value in (asked | fields).items()}


def as_text(question: Question, plan: Plan) -> str:
    """Returns the plan as text."""
    link, first, decode = question.link, plan.first_token, plan.decode
    marks = {way: "   <- fastest" if way == first.best else "" for way in ("recompute", "fetch", "both")}
    return "\n".join(
        [
            f"{question.model.name} on {question.gpus} x {question.gpu.name}, link {link.name}: "
            f"{link.down_gb_per_s:,.4g} GB/s, {link.rtt_ms:g} ms there and back",
            f"context {question.context_tokens:,} tokens, {plan.hit_tokens:,} of them in the store; "
            f"prefill at {question.mfu:.0%} of peak",
            "",
            f"KV         {plan.kv_token_bytes:,} B a token, page {_size(plan.page_bytes)}, "
            f"hits {_size(plan.hit_bytes)}, context {_size(plan.context_bytes)}",
            f"HBM / link {plan.hbm_to_link:,.0f}x ({question.gpu.hbm_gb_per_s:,.0f} GB/s of one GPU)",
            f"break-even {plan.break_even_gb_per_s:,.3g} GB/s: a faster link fetches the prefix sooner than it is computed "
            f"(compute {_time(plan.prefix_recompute_ms)}, fetch {_time(plan.prefix_fetch_ms)})",
            "",
            "time to first token",
            f"  recompute             {_time(first.recompute_ms):>10}{marks['recompute']}",
            f"  fetch                 {_time(first.fetch_ms):>10}{marks['fetch']}",
            f"  both until they meet  {_time(first.both_ms):>10}{marks['both']} ({first.both_computed_tokens:,} tokens computed)",
            "",
            "one decoded token at full context, batch 1",
            f"  KV in HBM             {_time(decode.hbm_ms):>10}",
            f"  KV fetched each step  {_time(decode.fetched_ms):>10}   {decode.fetched_ms / decode.hbm_ms:,.1f}x",
            f"  KV attended in place  {_time(decode.attend_ms):>10}   {decode.attend_ms / decode.hbm_ms:,.1f}x, "
            f"{_size(decode.attend_bytes)} over the link",
        ]
    )


def _lists() -> str:
    lines = ["models"]
    for name in model_names():
        model = load_model(name)
        lines.append(f"  {name:16} {model.parameters / 1e9:8.3g}e9 parameters, {model.layout(1).page_bytes:>9,} B of KV a token")
    lines.append("GPUs")
    lines += [
        f"  {gpu.name:16} {gpu.hbm_gb_per_s:6,.0f} GB/s, {gpu.bf16_tflop_per_s:6,.0f} TFLOP/s bf16: {gpu.source}"
        for gpu in GPUS.values()
    ]
    lines.append("links")
    lines += [f"  {link.name:16} {link.down_gb_per_s:6.4g} GB/s, {link.rtt_ms:5g} ms: {link.source}" for link in PROFILES.values()]
    return "\n".join(lines)


def _gpus(text: str) -> tuple[int, Gpu]:
    count, times, name = text.partition("x")
    if times and re.fullmatch("[0-9]+", count):
        return _GPUS(count), find_gpu(name)
    return 1, find_gpu(text)


def _tokens(text: str) -> int:
    number, unit = (text[:-1], _UNITS[text[-1].lower()]) if text[-1].lower() in _UNITS else (text, 1)
    try:
        tokens = round(_TOKENS(number) * unit)
    except InvalidValue:
        tokens = 0
    if not 1 <= tokens <= CONTEXT_TOKENS_MAX:
        raise InvalidArgument(
            f"{shown(text)} is not a number of tokens from 1 to {CONTEXT_TOKENS_MAX}, for example 6000, 32k or 1m"
        )
    return tokens


def _size(size_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:,.3g} {unit}"
    return f"{size_bytes:,.0f} B"


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:,.3g} s"
    return f"{milliseconds:,.3g} ms"
