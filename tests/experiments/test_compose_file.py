"""The local runner's parser of compose files: variables, durations, and no key that it ignores silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnstore.address import Address
from experiments.compose_local.compose_file import ComposeError, HealthCheck, Mount, PublishedPort, load_compose_file, seconds

FILE = """
services:
  node:
    image: some/image:1
    entrypoint: [serve]
    command: [--port, 7400, "--name=${NAME:-fallback}"]
    environment: {NUMBER: 7, PRICE: "$$5", FROM: "$PLAIN${EMPTY:-default}${EMPTY-}"}
    user: "7:8"
    cap_drop: [ALL]
    cap_add: [NET_ADMIN]
    volumes: ["./conf:/etc/conf:ro", "data:/data"]
    ports: ["127.0.0.1:0:80"]
    healthcheck: {test: [CMD, "true"], interval: 1m30s, timeout: 500ms, retries: 2, start_period: 1s}
    stop_grace_period: 3s
  side:
    image: other
    network_mode: "service:node"
    depends_on: {node: {condition: service_healthy}}
    profiles: [extra]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "docker-compose.yml"
    path.write_text(text)
    return path


def test_every_part_of_a_service_is_read(tmp_path: Path) -> None:
    services = load_compose_file(write(tmp_path, FILE), {"PLAIN": "p", "EMPTY": ""})
    node, side = services["node"], services["side"]
    assert node.command == ("serve", "--port", "7400", "--name=fallback")
    assert node.environment == {"NUMBER": "7", "PRICE": "$5", "FROM": "pdefault"}
    assert (node.user, node.capabilities, node.stop_grace_s) == ("7:8", ("NET_ADMIN",), 3.0)
    assert node.mounts == (Mount(str(tmp_path / "conf"), "/etc/conf", True), Mount("data", "/data", False))
    assert [mount.is_volume for mount in node.mounts] == [False, True]
    assert node.ports == (PublishedPort(Address("127.0.0.1", 0), 80),)
    assert node.health == HealthCheck(("true",), 90.0, 0.5, 2, 1.0)
    assert (side.network_of, side.depends_on, side.profiles) == ("node", {"node": "service_healthy"}, {"extra"})


def test_the_environment_goes_before_the_file_of_variables(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# ours\nNAME=from-file\nPLAIN=file\n")
    node = load_compose_file(write(tmp_path, FILE), {"PLAIN": "environment"})["node"]
    assert node.command[-1] == "--name=from-file"
    assert node.environment["FROM"] == "environmentdefault"


@pytest.mark.parametrize("environment", [{}, {"TOKEN": ""}])
def test_a_variable_that_is_required_and_not_set_is_named_with_its_reason(tmp_path: Path, environment: dict[str, str]) -> None:
    path = write(tmp_path, "services: {a: {image: '${TOKEN:?choose one}'}}")
    with pytest.raises(ComposeError, match=r"TOKEN is not set: choose one"):
        load_compose_file(path, environment)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("sysctls: {a: b}", "sysctls is not understood"),
        ("command: one string", "write it as a list"),
        ("network_mode: host", "'host' is not understood"),
        ("healthcheck: {test: [CMD-SHELL, a]}", "only the form"),
        ("stop_grace_period: 3 weeks", "not a duration"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, body: str, complaint: str) -> None:
    with pytest.raises(ComposeError, match=complaint):
        load_compose_file(write(tmp_path, f"services:\n  a:\n    image: x\n    {body}\n"), {})


def test_a_file_that_is_no_compose_file_is_refused(tmp_path: Path) -> None:
    for text in ("a: [", "services", "{}"):
        with pytest.raises(ComposeError):
            load_compose_file(write(tmp_path, text), {})


@pytest.mark.parametrize(("text", "value"), [("10s", 10.0), ("1h2m3s", 3723.0), ("250ms", 0.25)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value
