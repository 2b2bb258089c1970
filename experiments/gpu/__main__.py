"""`python -m experiments.gpu --out DIR [--device cuda] [--deadline 540] [--quick]`: every phase, then one document and one picture.

With `--device simulated --quick` every phase runs anywhere; only its times are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnstore.command_line import CommandParser
from experiments.gpu.report import document, picture, table
from experiments.gpu.targets import DEADLINE_S, PHASES
from experiments.options import COUNT

_GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the phases. Returns 0 if every phase ended in time and every check was right."""
    parser = CommandParser(prog="python -m experiments.gpu", description="Proves and measures the worker on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows, gpu.json, gpu.svg and gpu.md")
    parser.add_argument("--device", default="cuda", help="as for a worker (default: cuda)")
    parser.add_argument("--deadline", type=COUNT, default=DEADLINE_S, help=f"seconds for the whole run (default {DEADLINE_S})")
    parser.add_argument("--quick", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="only these (default: all)")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    states: dict[str, dict[str, object]] = {}
    for name in arguments.phases:
        left_s = arguments.deadline - (time.monotonic() - begin)
        states[name] = _run_phase(name, arguments, min(left_s, PHASES[name] * arguments.deadline / DEADLINE_S))
        found = document(arguments.out, states)
        (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, arguments.out / "gpu.svg")
    (arguments.out / "gpu.md").write_text(table(found))
    failed = [name for name, state in states.items() if state["state"] != "passed"]
    print(f"{len(states) - len(failed)} of {len(states)} phases passed" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _run_phase(name: str, arguments: object, deadline_s: float) -> dict[str, object]:
    """Runs a phase in a process of its own, which is killed at its deadline. Returns its state and duration."""
    device, out, quick = (getattr(arguments, field) for field in ("device", "out", "quick"))
    if deadline_s <= 1.0:
        return {"state": "no time was left", "seconds": 0.0}
    print(f"== {name}, at most {deadline_s:.0f} s", flush=True)
    command = [sys.executable, "-m", "experiments.gpu.phase", name, "--out", str(out), "--device", device]
    command += ["--quick"] if quick else []
    environment = dict(os.environ)
    if device == "simulated":  # no device runs compiled kernels then
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    try:
        code = subprocess.run(
            [*command, *(["--quick"] if quick else [])], env=environment, timeout=deadline_s, check=False
        ).returncode
        state = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        state = "ended at its deadline"
    return {"state": state, "seconds": round(time.monotonic() - begin, 1)}


if __name__ == "__main__":
    raise SystemExit(main())
