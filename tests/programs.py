"""The programs of the machine that some tests use, and their installation: `python -m tests.programs`, or `make tools`.

Owns: the list of programs and their Debian packages. Invariant: the installation never fails; a test without its program is skipped
with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Final

PACKAGES: Final = {
    "chromium": "chromium",
    "docker-compose": "docker-compose",
    "ip": "iproute2",
    "kubectl": "",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "setpriv": "util-linux",
    "tc": "iproute2",
    "unshare": "util-linux",
}
"""Program -> its Debian package, or nothing if no package is new enough."""

_NOT_FOR_A_TEST: Final = frozenset({"chromium"})
"""Packages of half a gigabyte."""
_APT_S_MAX: Final = 300
_APT: Final = ("apt-get", "-qq", "-o=Acquire::Retries=1", "-o=Acquire::http::Timeout=10", "-o=DPkg::Lock::Timeout=30")


def absent() -> list[str]:
    """Returns the programs that this machine does not have."""
    return [program for program in PACKAGES if shutil.which(program) is None]


def why_absent(program: str) -> str | None:
    """Returns the message for a program that this machine lacks, or None if it has it."""
    if shutil.which(program) is not None:
        return None
    package = PACKAGES[program]
    return f"{program} is not installed" + (f" (Debian: apt-get install {package})" if package else "")


def main() -> int:
    """Installs Debian's packages, if this is Debian and we are root, and prints what is still absent."""
    packages = {PACKAGES[program] for program in absent()} - _NOT_FOR_A_TEST - {""}
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        _apt("update")
        for package in sorted(packages):  # one by one: not every release has all of them
            _apt("install", "--yes", "--no-install-recommends", package)
    if lacking := absent():
        print(f"not installed: {', '.join(lacking)}; tests that use them are skipped, and say so", flush=True)
    return 0


def _apt(*arguments: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(
            [*_APT, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_APT_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # absent programs are listed at the end


if __name__ == "__main__":
    sys.exit(main())
