"""Compiled code is cached on disk if possible, and works without a cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as on a root that cannot be written, for a user without a home
from attnstore.copying import compiled

@compiled.compiled
def twice(number):
    return 2 * number
assert twice(21) == 42
from attnstore.copying.kernel import hash_layers
"""


def test_code_that_can_be_kept_nowhere_is_compiled_all_the_same_and_a_line_says_how_to_keep_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1
