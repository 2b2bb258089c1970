"""The command line; see the package and docs/tiers.md.

    python -m experiments.device_faults [--json PATH] [--quick]

Runs a cache and engines on the simulated device: with all waits in place, and with each left out in turn. Returns 0 if every wait
was noticed, and if with all of them nothing raced and every token and byte was right.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from experiments.device_faults.measure import measure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all and prints what was noticed."""
    parser = CommandParser("python -m experiments.device_faults", description="Waits of a device, each left out in turn.")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the result there, one JSON object")
    parser.add_argument("--quick", action="store_true", help="one scenario for each wait, and one engine")
    arguments = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # of a load or a write that meets a race
    try:
        report = measure(quick=arguments.quick)
    finally:
        logging.disable(logging.NOTSET)
    print(f"{len(report.caught)} of {len(report.waits)} waits noticed; {report.unsynchronised} races with all of them")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
