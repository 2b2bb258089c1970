"""What each subcommand of `attnstore-worker` does, and its output while it runs.

Owns: `ACTIONS`. It lies apart from the parser because it imports torch and transformers, which takes seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save

from attnstore.clock import MonotonicClock
from attnstore.command_line import say
from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument
from attnstore.limits import PROMPT_CHARS_MAX
from attnstore.memory_limit import resident_bytes
from attnstore.option_types import read_text
from attnstore.sizes import Share
from attnstore_worker.arguments import engine_options, require_pools
from attnstore_worker.cache import (
    CostPlanner,
    FetchAll,
    PageStore,
    Planner,
    RecomputeAll,
    open_store,
)
from attnstore_worker.cache.planning.decisions import Decision
from attnstore_worker.device.base import Device
from attnstore_worker.device.factory import open_device
from attnstore_worker.device.sizing import pool_blocks
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams, Sequence, Token
from attnstore_worker.explain import decisions_of, show, try_out
from attnstore_worker.model import LoadedModel, export_model, load_model
from attnstore_worker.model.prompts import chat_tokens, text_tokens
from attnstore_worker.options import AttendPolicy
from attnstore_worker.progress import Progress, create_progress
from attnstore_worker.report import GenerationReport, generation_report
from attnstore_worker.serve import Endpoint, serve

_log = logging.getLogger(__name__)


def _generate(arguments: argparse.Namespace) -> None:
    clock = MonotonicClock()
    prompt = _read_prompt(arguments.prompt_file)
    with ExitStack() as stack:
        progress = stack.enter_context(create_progress(sys.stderr))
        started_ms = clock.now_ms()
        engine = stack.enter_context(_open_engine(arguments, engine_options(arguments), progress))
        load_ms = clock.now_ms() - started_ms
        sequence = engine.submit(_prompt_ids(engine.model, prompt, arguments), _sampling(engine.model, arguments))
        tokens = _run(engine, sequence, progress)
        progress.phase("writing the last pages to the store")
        flush_started_ms = clock.now_ms()
        engine.flush(arguments.flush_ms)
        report = generation_report(engine, sequence, load_ms=load_ms, flush_ms=clock.now_ms() - flush_started_ms)
    if arguments.logits is not None:
        _write_logits(tokens, arguments.logits)
    _print_report(report, as_json=arguments.json)


def _serve(arguments: argparse.Namespace) -> None:
    options = replace(
        engine_options(arguments),
        sequences_max=arguments.sequences,
        waiting_max=arguments.waiting,
        prefetch_sequences=arguments.prefetch,
    )
    endpoint = Endpoint.create(
        arguments.host,
        arguments.port,
        token=arguments.token,
        tokens_file=arguments.tokens_file,
        insecure=arguments.insecure,
        allow_priority=arguments.allow_priority,
    )
    with ExitStack() as stack:
        with create_progress(sys.stderr) as progress:
            engine = stack.enter_context(_open_engine(arguments, options, progress))
        serve(engine, endpoint)
        engine.flush(arguments.flush_ms)


def _explain(arguments: argparse.Namespace) -> None:
    if arguments.source is not None:
        decisions = decisions_of(arguments.source, arguments.last, arguments.http_proxy, arguments.token)
    else:
        prompt = _read_prompt(arguments.prompt_file)
        with create_progress(sys.stderr) as progress, _open_engine(arguments, engine_options(arguments), progress) as engine:
            assert isinstance(engine.planner, CostPlanner)
            decisions = try_out(engine, engine.planner, _prompt_ids(engine.model, prompt, arguments))
    if arguments.json:
        say("\n".join(map(json.dumps, decisions)))
    else:
        console = Console()
        with console.capture() as shown:
            show(decisions, console)
        say(shown.get(), end="")


def _convert(arguments: argparse.Namespace) -> None:
    export_model(arguments.model, arguments.folder)


ACTIONS = {"generate": _generate, "serve": _serve, "explain": _explain, "convert": _convert}


@contextmanager
def _open_engine(arguments: argparse.Namespace, options: EngineOptions, progress: Progress) -> Iterator[Engine]:
    """Yields an engine after its first, slow calls, with its model and its store, if there is one."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        # Before the model is loaded: this checks the other options of the store, and sends nothing yet.
        store = stack.enter_context(_open_store(arguments)) if arguments.store else None
        device = stack.enter_context(closing(open_device(arguments.device)))
        require_pools(options, beside_bytes=0, pool_in_host_memory=device.addressable)
        if not device.addressable:
            print(f"attnstore-worker: the model runs on {device.name}: {device.description}", file=sys.stderr)
        progress.phase("loading the model")
        dtype = DType(arguments.dtype or (DType.FP32 if device.addressable else DType.BF16))
        model = load_model(arguments.model, dtype, device=device)
        if isinstance(arguments.pool, Share):
            options = replace(options, pool_bytes=pool_bytes_of(arguments.pool, model, options, device))
        require_pools(options, beside_bytes=resident_bytes(), pool_in_host_memory=device.addressable)
        clock = MonotonicClock()
        planner = stack.enter_context(_planner(arguments, options, clock))
        observer = planner if isinstance(planner, CostPlanner) else None
        engine = stack.enter_context(
            Engine(model, options, store=store, clock=clock, planner=planner, observer=observer, device=device)
        )
        progress.phase("warming up")
        engine.warm_up()
        yield engine


def pool_bytes_of(share: Share, model: LoadedModel, options: EngineOptions, device: Device) -> int:
    """Returns the bytes of a pool that takes `share` of the memory that the model and its steps leave free on the device; on the
    CPU the HOST tier takes some of it, too. Raises `PoolTooSmall`, `OutOfDeviceMemory` and `DeviceLost`.
    """
    layout = model.layout(options.block_tokens)
    if device.addressable:
        return pool_blocks(device, layout, share, reserve_bytes=options.host_pool_bytes) * layout.page_bytes
    # What the largest step and graphs take is known only when a step of as many tokens has run, and graphs are captured, in a pool
    # that is just large enough. torch keeps the memory of the step for the steps to come.
    step_blocks = -(-options.scheduler_limits().step_tokens // options.block_tokens)
    trial = replace(
        options,
        pool_bytes=(step_blocks + options.sequences_max) * layout.page_bytes,
        chunk_tokens=step_blocks * options.block_tokens,
        step_tokens=None,
        host_pool_bytes=0,
        attend=AttendPolicy.NEVER,
    )
    with Engine(model, trial, device=device) as engine:
        engine.warm_up()
        return pool_blocks(device, layout, share) * layout.page_bytes


@contextmanager
def _planner(arguments: argparse.Namespace, options: EngineOptions, clock: MonotonicClock) -> Iterator[Planner]:
    if arguments.planner == "fetch":
        yield FetchAll(options.store_deadline_ms)
    elif arguments.planner == "recompute":
        yield RecomputeAll()
    elif arguments.decisions is None:
        yield CostPlanner(clock, options.chunk_tokens)
    else:
        with _written("--decisions", arguments.decisions):
            file = arguments.decisions.open("ab", buffering=0)
        with file:

            def write(decision: Decision) -> None:
                try:
                    file.write(json.dumps(decision.as_json()).encode() + b"\n")
                except OSError as error:  # a full disk does not end a generation
                    _log.warning("--decisions %s cannot be written: %s", arguments.decisions, error.strerror)

            yield CostPlanner(clock, options.chunk_tokens, write)


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """Runs a block that writes the option's file. Raises `InvalidArgument`."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"{option} {path} cannot be written: {error.strerror}") from None


def _write_logits(tokens: Items[Token], path: Path) -> None:
    with _written("--logits", path):
        # Written here, because `save_file` would replace the file, which may be a device.
        path.write_bytes(save({"logits": torch.stack([token.logits for token in tokens if token.logits is not None])}))


def _open_store(arguments: argparse.Namespace) -> AbstractContextManager[PageStore]:
    return open_store(
        arguments.store,
        deadline_ms=arguments.store_deadline_ms,
        transport=arguments.transport,
        shared_path=arguments.shared_path,
        http_proxy=arguments.http_proxy,
        tls_ca=arguments.store_ca,
    )


def _run(engine: Engine, sequence: Sequence, progress: Progress) -> list[Token]:
    tokens: list[Token] = []
    while sequence.finish_reason is None:
        tokens += engine.step()
        progress.tokens(sequence)
    if sequence.error is not None:
        raise sequence.error
    return tokens


def _read_prompt(path: Path) -> str:
    try:
        return read_text(path, PROMPT_CHARS_MAX)
    except InvalidArgument as error:
        raise InvalidArgument(f"--prompt-file: {error}") from None


def _prompt_ids(model: LoadedModel, prompt: str, arguments: argparse.Namespace) -> list[int]:
    if arguments.chat:
        token_ids = chat_tokens(model.tokenizer, [{"role": "user", "content": prompt}])
    else:
        token_ids = text_tokens(model.tokenizer, prompt)
    return token_ids[: arguments.prompt_tokens]


def _sampling(model: LoadedModel, arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop_token_ids=frozenset() if arguments.ignore_stop else model.stop_token_ids,
        logits=arguments.logits is not None,
    )


def _print_report(report: GenerationReport, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(asdict(report)))
        return
    say(report.text)
    print(report.summary(), file=sys.stderr)
