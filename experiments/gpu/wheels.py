"""`python -m experiments.gpu.wheels DIR`: the packages that a machine with a GPU, its torch and transformers usually lacks.

`make gpu WHEELS=DIR` installs them there into a folder of their own, without a network. numba is not among them: nothing on the
GPU path imports it.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attnstore.command_line import CommandParser

_PRESENT: Final = ("accelerate", "attnstore", "jinja2", "numpy", "safetensors", "torch", "transformers", "triton")
"""Comes with transformers and torch for the device, or is not needed for random weights."""
_WITHOUT_DEPENDENCIES: Final = ("gguf",)
"""Would bring numpy."""
_PLATFORMS: Final = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads the wheels."""
    parser = CommandParser(prog="python -m experiments.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default="3.12", help="Python of the machine with the GPU (default 3.12)")
    arguments = parser.parse_args(argv)
    alone: list[str] = []
    others: list[str] = []
    for requirement in wanted(Path("pyproject.toml")):
        (alone if requirement.startswith(_WITHOUT_DEPENDENCIES) else others).append(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--dest", str(arguments.folder), "--python-version", arguments.python_version, "-c", "constraints.txt"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *others], check=True)
    subprocess.run([*command, "--no-deps", *alone], check=True)
    wheels = sorted(arguments.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.1f} MB, in {arguments.folder}")
    return 0


def wanted(pyproject: Path) -> list[str]:
    """Returns the requirements of a client, a node and a worker, but those that are present on a machine with a GPU."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    found = {*project["dependencies"], *extras["node"], *extras["worker"]}
    return sorted(requirement for requirement in found if not requirement.startswith(_PRESENT))


if __name__ == "__main__":
    raise SystemExit(main())
