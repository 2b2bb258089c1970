"""docker-compose.yml and its images: valid, interpreted alike by docker-compose and by the local runner, safe by default."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compose_local import ComposeError, load_compose_file

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))
SECRETS = {"ATTNSTORE_TOKEN": "a-token", "GRAFANA_PASSWORD": "a-password"}
PROFILES = ("experiments", "link", "vllm")


def config(*files: str) -> dict[str, Any]:
    """docker-compose's interpretation of our files."""
    command = [
        "docker-compose",
        *(f"--file={ROOT / file}" for file in files),
        *(f"--profile={name}" for name in PROFILES),
        "config",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**SECRETS, "PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return services


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Returns instruction and argument of each line, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", dockerfile.read_text())
    pairs = (line.partition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return [(name, argument) for name, _, argument in pairs]


@pytest.mark.needs("docker-compose")
def test_docker_compose_and_the_local_runner_read_the_same_services() -> None:
    theirs, ours = config("docker-compose.yml"), load_compose_file(COMPOSE, SECRETS)
    assert set(theirs) == set(ours)
    for name, service in ours.items():
        them = theirs[name]
        assert service.command == (*them.get("entrypoint", ()), *map(str, them.get("command", ()))), name
        # docker-compose prints a file that it can read again, so it doubles what could be a variable.
        assert {key: value.replace("$", "$$") for key, value in service.environment.items()} == them.get("environment", {}), name
        assert service.health is None or ["CMD", *service.health.command] == them["healthcheck"]["test"], name
        assert dict(service.depends_on) == {other: how["condition"] for other, how in them.get("depends_on", {}).items()}, name
        assert (service.image, service.read_only) == (them["image"], them.get("read_only", False)), name
        assert {mount.target for mount in service.mounts} == {volume.split(":")[1] for volume in them.get("volumes", ())}, name


@pytest.mark.needs("docker-compose")
def test_the_gpu_file_gives_each_worker_one_device_and_torch_built_for_it() -> None:
    services = config("docker-compose.yml", "docker-compose.gpu.yml")
    for name in ("worker1", "worker2"):
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
        assert "TORCH_INDEX" in services[name]["build"]["args"]
        assert services[name]["command"] == config("docker-compose.yml")[name]["command"]


def test_the_cluster_does_not_start_without_secrets_of_its_own() -> None:
    for missing in SECRETS:
        with pytest.raises(ComposeError, match=missing):
            load_compose_file(COMPOSE, {name: value for name, value in SECRETS.items() if name != missing})


def test_services_run_with_no_more_rights_than_they_need() -> None:
    for service in load_compose_file(COMPOSE, SECRETS).values():
        if service.name.startswith("link-"):
            assert service.capabilities == ("NET_ADMIN",)
            continue
        assert service.capabilities == (), service.name
        assert service.read_only, service.name
        assert not service.user.startswith("0"), service.name


def test_only_loopback_ports_are_published_and_none_of_the_store_or_the_directory() -> None:
    for service in load_compose_file(COMPOSE, SECRETS).values():
        assert {port.address.host for port in service.ports} <= {"127.0.0.1"}
        assert not service.ports or service.name in {"worker1", "worker2", "vllm", "prometheus", "grafana"}


def test_every_service_that_stays_has_a_health_check() -> None:
    services = load_compose_file(COMPOSE, SECRETS)
    assert all(service.health for name, service in services.items() if not service.profiles and name != "cluster-key")


def test_only_nodes_have_the_key_and_everybody_else_its_public_part() -> None:
    services = load_compose_file(COMPOSE, SECRETS)
    private = {name for name, service in services.items() if any(mount.source == "cluster-private" for mount in service.mounts)}
    assert private == {"cluster-key", "store1", "store2", "store3"}
    for name, service in services.items():
        stores = [argument for argument in service.command if "redis://redis" in argument]
        assert all("key=/etc/attnstore/public/cluster.pub" in argument for argument in stores), name
        assert not stores or any(mount.source == "cluster-public" and mount.read_only for mount in service.mounts), name


def test_images_are_pinned() -> None:
    for service in load_compose_file(COMPOSE, SECRETS).values():
        assert re.search(r":v?\d+\.\d+\.\d+", service.image), service.image
    for dockerfile in DOCKERFILES:
        stages = set()
        for name, argument in instructions(dockerfile):
            if name == "FROM":
                image, _, stage = argument.partition(" AS ")
                assert image in stages or re.search(r":\d+\.\d+\.\d+", image), f"{dockerfile.name}: {image}"
                stages.add(stage)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_exists_and_reaches_the_build(dockerfile: Path) -> None:
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, argument in instructions(dockerfile):
        if name == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), f"{dockerfile.name} copies {source}"
                assert source in admitted, f".dockerignore hides {source} from {dockerfile.name}"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_say_who_runs_and_how_health_is_seen(dockerfile: Path) -> None:
    lines = dict(instructions(dockerfile))
    assert "HEALTHCHECK" in lines
    assert lines["USER"] == "10001:10001" or dockerfile.name == "Dockerfile.link"


def test_the_image_of_a_store_node_installs_no_torch() -> None:
    installs = [argument for name, argument in instructions(ROOT / "deploy/docker/Dockerfile.store") if name == "RUN"]
    assert any("'.[node,redis]'" in argument for argument in installs)
    assert not any("worker]" in argument or "attention" in argument or "torch" in argument for argument in installs)
