"""`python -m attnstore_worker`: the command `attnstore-worker`."""

from __future__ import annotations

import sys

from attnstore_worker.cli import main

if __name__ == "__main__":
    sys.exit(main())
