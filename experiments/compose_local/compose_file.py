"""The parser of `docker-compose.yml`, which refuses what it does not support.

Owns: variables, durations, and the subset of the Compose specification that our file uses. Invariant: an unknown key is an error,
so that a local run never differs silently from the file; `NOT_APPLIED` names the keys that are read and have no effect.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from attnstore.address import Address

NOT_APPLIED: Final = {
    "build": "images are not built: executables of this machine take their place",
    "restart": "a service that ends stays down, which is what experiments want to see",
    "security_opt": "no-new-privileges is always set",
}

_APPLIED: Final = frozenset(
    [
        "image",
        "entrypoint",
        "command",
        "environment",
        "user",
        "working_dir",
        "read_only",
        "cap_drop",
        "cap_add",
        "volumes",
        "tmpfs",
        "ports",
        "depends_on",
        "healthcheck",
        "stop_grace_period",
        "network_mode",
        "profiles",
    ]
)
_VARIABLE: Final = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<braced>\w+)(?:(?P<operator>:?[-?])(?P<text>[^}]*))?\}|(?P<plain>\w+))")
_DURATION: Final = re.compile(r"(\d+)(ms|s|m|h)")
_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class ComposeError(Exception):
    """The file, or a variable that it requires, is invalid."""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """`command` exits with 0 while the service is healthy. Failures within `start_s` of the start do not count."""

    command: tuple[str, ...]
    interval_s: float
    timeout_s: float
    retries: int
    start_s: float


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder (`source` contains a slash) or a named volume, mounted at `target`."""

    source: str
    target: str
    read_only: bool

    @property
    def is_volume(self) -> bool:
        """Whether `source` names a volume."""
        return "/" not in self.source


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """`container_port` published under `address`; port 0 takes a free one."""

    address: Address
    container_port: int


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `depends_on`: service -> condition. `network_of`: the service whose network it shares, if it has none of its
    own.
    """

    name: str
    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    user: str
    working_dir: str
    read_only: bool
    capabilities: tuple[str, ...] | None
    mounts: tuple[Mount, ...]
    tmpfs: tuple[str, ...]
    ports: tuple[PublishedPort, ...]
    depends_on: Mapping[str, str]
    health: HealthCheck | None
    stop_grace_s: float
    network_of: str | None
    profiles: frozenset[str] = field(default=frozenset())


def load_compose_file(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, Service]:
    """Returns the services by name. Variables come from `environment`, then from `.env` beside the file.

    Raises `ComposeError` for a file that is malformed or has unsupported content, and for a missing required variable.
    """
    variables = {**_dotenv(path.parent / ".env"), **environment}
    try:
        document = yaml.safe_load(path.read_text())
        services = document["services"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ComposeError(f"{path}: {error}") from None
    return {name: _service(name, _interpolated(body, variables), path.parent) for name, body in services.items()}


def seconds(duration: str) -> float:
    """Parses a duration such as `1m30s` or `500ms`. Raises `ComposeError`."""
    parts = _DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ComposeError(f"{duration!r} is not a duration such as 1m30s")
    return sum(int(number) * _UNIT_S[unit] for number, unit in parts)


def _service(name: str, body: Mapping[str, Any], folder: Path) -> Service:
    unknown = set(body) - _APPLIED - set(NOT_APPLIED)
    if unknown:
        raise ComposeError(f"service {name}: {', '.join(sorted(unknown))} is not understood here")
    dependencies = body.get("depends_on", {})
    return Service(
        name=name,
        image=body["image"],
        command=(*_strings(body.get("entrypoint", ())), *_strings(body.get("command", ()))),
        environment={key: str(value) for key, value in body.get("environment", {}).items()},
        user=str(body.get("user", "0:0")),
        working_dir=body.get("working_dir", "/"),
        read_only=body.get("read_only", False),
        capabilities=tuple(body.get("cap_add", ())) if body.get("cap_drop") == ["ALL"] else None,
        mounts=tuple(_mount(text, folder) for text in body.get("volumes", ())),
        tmpfs=tuple(body.get("tmpfs", ())),
        ports=tuple(map(_port, body.get("ports", ()))),
        depends_on={other: how["condition"] for other, how in dependencies.items()},
        health=_health_check(body["healthcheck"]) if "healthcheck" in body else None,
        stop_grace_s=seconds(body.get("stop_grace_period", "10s")),
        network_of=_network_of(body.get("network_mode")),
        profiles=frozenset(body.get("profiles", ())),
    )


def _strings(values: str | list[Any]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ComposeError(f"command {values!r}: write it as a list, one argument an item")
    return tuple(map(str, values))


def _mount(text: str, folder: Path) -> Mount:
    source, target, *mode = text.split(":")
    return Mount(str((folder / source).resolve()) if "/" in source else source, target, mode == ["ro"])


def _port(text: str) -> PublishedPort:
    address, _, container_port = text.rpartition(":")
    return PublishedPort(Address.parse(address), int(container_port))


def _network_of(mode: str | None) -> str | None:
    if mode is None:
        return None
    kind, _, other = mode.partition(":")
    if kind != "service":
        raise ComposeError(f"network_mode {mode!r} is not understood here")
    return other


def _health_check(body: Mapping[str, Any]) -> HealthCheck:
    kind, *command = body["test"]
    if kind != "CMD":
        raise ComposeError(f"healthcheck {body['test']}: only the form [CMD, ...] is understood here")
    return HealthCheck(
        tuple(map(str, command)),
        seconds(body.get("interval", "30s")),
        seconds(body.get("timeout", "30s")),
        int(body.get("retries", 3)),
        seconds(body.get("start_period", "0s")),
    )


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _substitute(found, variables), value)
    if isinstance(value, dict):
        return {key: _interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, variables) for item in value]
    return value


def _substitute(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["escaped"]:
        return "$"
    name = found["braced"] or found["plain"]
    operator = found["operator"] or ""
    value = variables.get(name)
    if value is None or (operator.startswith(":") and not value):
        if operator.endswith("?"):
            raise ComposeError(f"the variable {name} is not set: {found['text']}")
        return found["text"] if operator else ""
    return value


def _dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
