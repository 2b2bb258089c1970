"""The `attnstore` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

import uvloop

from attnstore.allocator import keep_freed_memory
from attnstore.config import add_serve_options, load_serve_options
from attnstore.errors import AttnStoreError
from attnstore.server.node import serve
from attnstore.telemetry import configure_logs
from attnstore.whatif.command import add_plan_options, run_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, or 2 after one line on standard error that says what is wrong."""
    parser = argparse.ArgumentParser(prog="attnstore", description="AttnStore: a network Attention store for LLM inference.")
    parser.add_argument("--version", action="version", version=f"attnstore {version('attnstore')}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="run a store node", description="Run a store node until SIGTERM.")
    add_serve_options(serve_parser)
    serve_parser.set_defaults(run=_serve)
    plan_parser = commands.add_parser(
        "plan", help="what moving KV would cost on other hardware", description="Estimates when a network may hold a model's KV."
    )
    add_plan_options(plan_parser)
    plan_parser.set_defaults(run=run_plan)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except AttnStoreError as error:
        print(f"attnstore: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    options = load_serve_options(arguments)
    configure_logs(options.log_level, options.log_format)
    keep_freed_memory()
    uvloop.run(serve(options))


if __name__ == "__main__":
    sys.exit(main())
