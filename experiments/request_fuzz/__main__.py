"""Ten thousand invalid requests by default; the exit status is 1 if one was not answered correctly."""

from __future__ import annotations

import tempfile
from pathlib import Path

from attnstore.command_line import CommandParser
from attnstore_worker.testing import write_tiny_model
from experiments.options import COUNT, SEED
from experiments.request_fuzz.run import fuzz, report


def main() -> int:
    """Runs the command."""
    parser = CommandParser("python -m experiments.request_fuzz", description="Wrong requests to a worker's endpoint.")
    parser.add_argument("--requests", type=COUNT, default=10_000, metavar="N", help="how many (default 10000)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the requests (default 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), context_tokens_max=128)
        outcome = fuzz(Path(folder), seed=arguments.seed, count=arguments.requests)
    print("\n".join(report(outcome)))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
