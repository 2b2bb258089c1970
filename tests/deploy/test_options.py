"""Compose file and manifests use only options that our programs have: a misspelt option would be ignored, or stop the start."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from attnstore.config import ServeOptions
from experiments.compose_local import load_compose_file

ROOT = Path(__file__).parents[2]
OTHER_VARIABLES = {"ATTNSTORE_CACHE_DIR", "ATTNSTORE_TOKEN", "ATTNSTORE_DIRECTORY", "ATTNSTORE_WORKER_TOKEN"}
"""Read by a worker, or by the manifest itself."""

Start = tuple[str, tuple[str, ...], Mapping[str, str]]


def starts_in_compose() -> Iterator[Start]:
    secrets = {"ATTNSTORE_TOKEN": "a", "GRAFANA_PASSWORD": "b"}
    for service in load_compose_file(ROOT / "docker-compose.yml", secrets).values():
        yield service.name, service.command, service.environment


def starts_in_kubernetes() -> Iterator[Start]:
    for path in ("node.yaml", "worker.yaml"):
        for manifest in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "base" / path).read_text()):
            for container in manifest["spec"].get("template", {}).get("spec", {}).get("containers", ()):
                environment = {entry["name"]: str(entry.get("value", "")) for entry in container["env"]}
                yield container["name"], tuple(container["args"]), environment


STARTS = [
    pytest.param(*start, id=f"{where}-{start[0]}")
    for where, starts in (("compose", starts_in_compose()), ("kubernetes", starts_in_kubernetes()))
    for start in starts
    if start[1][:1] in (("attnstore",), ("attnstore-worker",))
]


@pytest.mark.parametrize(("name", "command", "environment"), STARTS)
def test_every_variable_is_one_that_is_read(name: str, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
    ours = {variable for variable in environment if variable.startswith("ATTNSTORE_")}
    options = {f"ATTNSTORE_{field.upper()}" for field in ServeOptions.model_fields} if command[:1] == ("attnstore",) else set()
    assert ours <= options | OTHER_VARIABLES, name


@pytest.mark.parametrize(("name", "command", "environment"), STARTS)
def test_every_argument_is_one_that_is_taken(name: str, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
    del name, environment
    shown = help_of(*command[:2])
    assert all(argument.partition("=")[0] in shown for argument in command[2:] if argument.startswith("-"))


@pytest.mark.parametrize(("name", "command", "environment"), STARTS)
def test_a_worker_that_others_reach_says_who_may_use_it(
    name: str, command: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    if command[:2] == ("attnstore-worker", "serve"):
        assert "--host=0.0.0.0" in command
        assert ("ATTNSTORE_WORKER_TOKEN" in environment) or "--insecure" in command, name


@functools.cache
def help_of(program: str, command: str) -> str:
    path = shutil.which(program, path=str(Path(sys.executable).parent))
    assert path is not None
    return subprocess.run([path, command, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_node_of_the_manifests_would_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its options pass every check but the last: an address that this machine does not have."""
    (environment,) = (environment for name, _, environment in starts_in_kubernetes() if name == "node")
    for name, value in {**environment, "ATTNSTORE_TOKEN": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ATTNSTORE_NODE_ID", "attnstore-node-0")
    monkeypatch.setenv("ATTNSTORE_DIRECTORY", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("ATTNSTORE_ADVERTISE", "attnstore-node-0.attnstore-node:7400")
    monkeypatch.setenv("ATTNSTORE_CAPACITY", "64MiB")
    monkeypatch.setenv("ATTNSTORE_LISTEN", "192.0.2.1:7400")
    assert environment["ATTNSTORE_CLUSTER_KEY"] == "/etc/attnstore/cluster.key"
    key = tmp_path / "cluster.key"
    subprocess.run([sys.executable, "-m", "attnstore.cli", "cluster-key", str(key)], check=True, timeout=60)
    monkeypatch.setenv("ATTNSTORE_CLUSTER_KEY", str(key))
    node = subprocess.run([sys.executable, "-m", "attnstore.cli", "serve"], capture_output=True, text=True, timeout=60)
    assert node.returncode == 2
    assert "192.0.2.1:7400 cannot be bound" in node.stderr
