"""A machine with only what the README requires, made from this one: Python, a shell, coreutils, make, git.

    python3 -m tests.minimal_machine COMMAND...          for example: make test

runs COMMAND with a PATH without apt-get, Docker, Prometheus, Chromium, iproute2 or openssl, in an environment of a few variables.
Standard library only, because it is used before anything is installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PROGRAMS: Final = (
    *("sh", "bash", "env", "python3", "make", "git", "diff", "grep", "sed", "find", "xargs", "tar", "gzip", "uname", "hostname"),
    *("basename", "cat", "chmod", "chown", "cp", "cut", "date", "dirname", "echo", "expr", "false", "head", "id", "ln", "ls"),
    *("mkdir", "mktemp", "mv", "nice", "nproc", "printf", "pwd", "readlink", "realpath", "rm", "rmdir", "seq", "sleep", "sort"),
    *("stat", "tail", "tee", "test", "timeout", "touch", "tr", "true", "uniq", "wc"),
)
_KEPT: Final = ("HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE")
"""Variables without which a process finds no home, no language, no package registry."""


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yields the environment of a process on such a machine; valid inside the block."""
    with tempfile.TemporaryDirectory(prefix="minimal-machine-") as folder:
        for program in PROGRAMS:
            path = shutil.which(program)
            if path is not None:
                # Not a link, because Python resolves its own location through links, and a virtual environment would keep it.
                script = Path(folder, program)
                script.write_text(f'#!/bin/sh\nexec {shlex.quote(path)} "$@"\n')
                script.chmod(0o755)
        yield {"PATH": folder, **{name: os.environ[name] for name in _KEPT if name in os.environ}}


def main() -> int:
    """Runs the command. Returns its exit status."""
    with environment() as variables:
        program = shutil.which(sys.argv[1], path=variables["PATH"]) or sys.argv[1]
        return subprocess.run([program, *sys.argv[2:]], env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
