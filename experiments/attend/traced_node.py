"""A store node that notes when it receives, computes and answers each attend query, for `experiments.attend.timeline`.

python -m experiments.attend.traced_node PATH PYTHON -m attnstore.cli ARGUMENTS... runs `attnstore ARGUMENTS...` in this process and
writes the notes to PATH when it ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from attnstore import cli
from attnstore.attention.in_place import InPlaceAttention
from attnstore.server.attend import AttendSession
from attnstore.server.attend_channel import AttendChannel
from experiments.attend.notes import Notes


def main() -> int:
    """Runs the node. Returns its exit status."""
    path, arguments = Path(sys.argv[1]), sys.argv[5:]
    notes = Notes()
    notes.take(AttendChannel, "_query", "query")
    notes.take(AttendSession, "answer", "answer")
    notes.take(InPlaceAttention, "attend", "compute")
    try:
        return cli.main(arguments)
    finally:
        path.write_text(json.dumps(notes.spans))


if __name__ == "__main__":
    raise SystemExit(main())
