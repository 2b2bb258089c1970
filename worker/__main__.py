"""The `attnstore-worker` command: checks that the worker's packages are installed before anything imports them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnstore.errors import InvalidArgument
from attnstore.extras import needs_extra


def main(argv: Sequence[str] | None = None) -> int:
    """See `worker.cli.main`."""
    try:
        with needs_extra("worker", "a worker"):
            from worker.cli import main as run

            return run(argv)
    except InvalidArgument as error:
        print(f"attnstore-worker: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
