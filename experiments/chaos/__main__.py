"""`python -m experiments.chaos --seed N --minutes M --json PATH`: faults in a running cluster under load; needs root.

The cluster of docker-compose.yml, run by `experiments.compose_local`. Two workers answer prompts whose continuation is known, four
raw clients read and write pages whose bytes are known. Nodes are killed, frozen and cut off, the directory is killed and cut off,
workers are cut off. Some callers misbehave: they write rogue records into the directory, set too short deadlines, send bytes
slowly, or use up their tenant's limits. Exit status 0 if no byte and no token was wrong, no call hung or failed, the hit rate
recovered in time after every fault, and no misbehaving caller affected the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from experiments.chaos.faults import RECOVERY_S_MAX
from experiments.chaos.observation import HUNG_S, Verdict
from experiments.chaos.run import run_chaos
from experiments.options import POSITIVE, SEED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints, writes."""
    parser = CommandParser("python -m experiments.chaos", description="Faults in a running cluster under load.")
    parser.add_argument("--seed", type=SEED, default=0, help="of the faults and of the load (default 0)")
    parser.add_argument("--minutes", type=POSITIVE, default=1.0, help="of load (default 1)")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the verdict")
    parser.add_argument("--volumes", type=Path, default=Path.home() / ".cache" / "attnstore" / "volumes", metavar="FOLDER")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    verdict = run_chaos(
        options.seed, options.minutes * 60, options.volumes, os.environ, lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(told(verdict))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(verdict) | {"good": verdict.is_good}, indent=1) + "\n")
    return 0 if verdict.is_good else 1


def told(verdict: Verdict) -> str:
    """Returns the verdict as text."""
    calls = ", ".join(f"{count:,} {verb}" for verb, count in sorted(verdict.calls.items()))
    slowest = ", ".join(f"{verb} {seconds:.2f} s" for verb, seconds in verdict.slowest_s.items())
    errors = ", ".join(f"{count} {name}" for name, count in sorted(verdict.errors.items())) or "none"
    lines = [
        f"seed {verdict.seed}, {verdict.run_s:g} s of load: {calls}",
        f"wrong pages: {verdict.wrong_pages}, wrong texts: {verdict.wrong_texts}",
        f"hung (over {HUNG_S:g} s beyond the deadline): {verdict.hung}, failed: {verdict.failed}; slowest: {slowest}",
        f"errors that mean a miss: {errors}",
        f"hit rate of the clients {verdict.hit_rate:.1%}, of the workers' prompts {verdict.worker_hit_rate:.1%}",
        f"back at 90% of its level within {RECOVERY_S_MAX:g} s of the heal:",
    ]
    for each in verdict.recoveries:
        after = "NOT in time" if each.recovered_s is None else f"after {each.recovered_s:.1f} s"
        lines.append(
            f"  {each.service} {each.kind} at {each.began_s:.1f} s, healed at {each.healed_s:.1f} s: {after} "
            f"(level {each.level:.1%}, meanwhile {each.during:.1%}, lowest second {each.lowest:.1%})"
        )
    return "\n".join([*lines, "all as it must be" if verdict.is_good else "NOT as it must be"])


if __name__ == "__main__":
    sys.exit(main())
