"""The allocator setting takes effect where the C library is glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

_MAPPINGS_OF_LARGE_BLOCKS = """
from pathlib import Path
from attnstore.allocator import keep_freed_memory

def mappings():
    return Path("/proc/self/maps").read_text().count("\\n")

kept = keep_freed_memory()
before = mappings()
blocks = [bytes(bytearray(8 << 20)) for _ in range(8)]
print(kept, mappings() - before < len(blocks))
"""


def test_large_blocks_come_from_kept_memory_and_not_from_mappings_of_their_own() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _MAPPINGS_OF_LARGE_BLOCKS], capture_output=True, text=True, timeout=60, check=True
    )
    if platform.libc_ver()[0] == "glibc":
        assert answer.stdout.split() == ["True", "True"]
    else:
        assert answer.stdout.startswith("False")
