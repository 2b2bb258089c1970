"""The `attnstore-worker` command.

Owns: the order of a start, and the exit status. Invariant: wrong options are refused, and help is printed, before torch and
transformers are imported.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence

from attnstore import copying
from attnstore.allocator import keep_freed_memory
from attnstore.command_line import run_command
from attnstore.extras import needs_extra
from attnstore_worker.arguments import check_options, create_parser
from attnstore_worker.openmp import spin_briefly

_EXIT_INTERRUPTED = 130
_PACKAGES = ("torch", "transformers", "pydantic", "prometheus_client", "rich", "safetensors", "starlette", "uvicorn")
"""What every subcommand imports; models and kernels need others, which are missed when they are used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 2 after an error message of one line on standard error."""
    spin_briefly()

    def run() -> None:
        with needs_extra("worker", "a worker"):
            _require_packages()
            arguments = create_parser().parse_args(argv)
            logging.basicConfig(level=logging.WARNING, format="attnstore-worker: %(message)s")
            check_options(arguments)
            keep_freed_memory()
            copying.prepare()
            from attnstore_worker.actions import ACTIONS

            ACTIONS[arguments.command](arguments)

    return run_command("attnstore-worker", run, interrupted=_EXIT_INTERRUPTED)


def _require_packages() -> None:
    """Raises `ModuleNotFoundError` for the first that is not installed, without the seconds of importing them."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


if __name__ == "__main__":
    sys.exit(main())
