"""The `attnstore-worker` command: sets the environment that torch reads when it is loaded, and checks that the worker's packages
are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnstore.errors import InvalidArgument
from attnstore.extras import needs_extra
from attnstore_worker.openmp import spin_briefly


def main(argv: Sequence[str] | None = None) -> int:
    """See `attnstore_worker.cli.main`."""
    spin_briefly()
    try:
        with needs_extra("worker", "a worker"):
            from attnstore_worker.cli import main as run

            return run(argv)
    except InvalidArgument as error:
        print(f"attnstore-worker: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
