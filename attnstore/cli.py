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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, or 2 after one line on standard error that says what is wrong."""
    parser = argparse.ArgumentParser(prog="attnstore", description="AttnStore: a network Attention store for LLM inference.")
    parser.add_argument("--version", action="version", version=f"attnstore {version('attnstore')}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="run a store node", description="Run a store node until SIGTERM.")
    add_serve_options(serve_parser)
    arguments = parser.parse_args(argv)
    try:
        options = load_serve_options(arguments)
        configure_logs(options.log_level, options.log_format)
        keep_freed_memory()
        uvloop.run(serve(options))
    except AttnStoreError as error:
        print(f"attnstore: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
