"""The local runner: a service gets what the file specifies (user, files, network, health), and nothing of it remains afterwards."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.compose_local import ComposeCluster, ComposeError, ServiceFailed
from tests.samples import eventually

pytestmark = pytest.mark.netns

_RUN_S_MAX = 60.0

FILE = """
services:
  web:
    image: web
    user: "10001:10002"
    read_only: true
    cap_drop: [ALL]
    environment: {GREETING: hello}
    tmpfs: ["/scratch"]
    volumes: ["./page.txt:/srv/page.txt:ro", "kept:/kept"]
    working_dir: /srv
    command: [python, -m, http.server, "8080"]
    ports: ["127.0.0.1:0:8080"]
    stop_grace_period: 1s
    healthcheck: {test: [CMD, python, -c, "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/page.txt')"], timeout: 20s}
  probe:
    image: probe
    profiles: [probe]
    command: [python, -c]
    depends_on: {web: {condition: service_healthy}}
  inspector:
    image: inspector
    profiles: [probe]
    user: "10001:10002"
    read_only: true
    cap_drop: [ALL]
    environment: {GREETING: hello}
    tmpfs: ["/scratch"]
    volumes: ["./page.txt:/srv/page.txt:ro", "kept:/kept"]
    command: [sh, -c]
  absent:
    image: absent
    command: [no-such-program]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compose")
    (folder / "docker-compose.yml").write_text(FILE)
    (folder / "page.txt").write_text("a page")
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[ComposeCluster]:
    with ComposeCluster(folder / "docker-compose.yml", volumes=folder / "volumes", environment={}) as cluster:
        yield cluster


def fetch(cluster: ComposeCluster) -> str:
    with urllib.request.urlopen(f"http://{cluster.published('web', 8080)}/page.txt", timeout=5) as answer:
        return str(answer.read().decode())


def inspect(cluster: ComposeCluster, script: str) -> str:
    status, printed = cluster.run_once("inspector", _RUN_S_MAX, script)
    assert status == 0, printed
    return printed


def test_a_published_port_leads_to_the_service(cluster: ComposeCluster) -> None:
    assert fetch(cluster) == "a page"


def test_services_find_each_other_by_name(cluster: ComposeCluster) -> None:
    script = "import urllib.request as u; print(u.urlopen('http://web:8080/page.txt', timeout=5).read())"
    assert cluster.run_once("probe", _RUN_S_MAX, script)[1].endswith("b'a page'\n")


def test_a_service_has_its_own_user_host_name_processes_and_environment(cluster: ComposeCluster) -> None:
    printed = inspect(cluster, "echo $(id -u) $(id -g) $(hostname) $$ $GREETING; grep -h -e CapBnd -e NoNewPrivs /proc/self/status")
    assert printed.splitlines() == ["10001 10002 inspector 1 hello", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]


def test_only_mounts_can_be_written_and_only_volumes_last(cluster: ComposeCluster, folder: Path) -> None:
    script = "for file in /etc/no /srv/page.txt /scratch/yes /kept/yes; do (: > $file) 2>/dev/null && echo $file; done; true"
    assert inspect(cluster, script).split() == ["/scratch/yes", "/kept/yes"]
    assert (folder / "volumes" / "kept" / "yes").exists()
    assert (folder / "page.txt").read_text() == "a page"
    assert not Path("/srv/page.txt").exists()
    assert inspect(cluster, "ls /scratch /kept").split() == ["/kept:", "yes", "/scratch:"]


def test_a_killed_service_is_gone_until_it_is_started_again(cluster: ComposeCluster) -> None:
    cluster.kill("web")
    assert not cluster.is_healthy("web")
    with pytest.raises((urllib.error.URLError, OSError)):
        fetch(cluster)
    cluster.start("web")
    assert eventually(lambda: cluster.is_healthy("web"))
    assert fetch(cluster) == "a page"


def test_a_cut_link_hides_a_service_that_stays_healthy(cluster: ComposeCluster) -> None:
    script = "import socket; socket.create_connection(('web', 8080), timeout=1); print('connected')"
    cluster.cut("web")
    assert "TimeoutError" in cluster.run_once("probe", _RUN_S_MAX, script)[1]
    assert cluster.is_healthy("web")
    cluster.mend("web")
    assert cluster.run_once("probe", _RUN_S_MAX, script)[1].endswith("connected\n")


def test_a_service_whose_program_is_not_here_is_named_and_left_out(cluster: ComposeCluster) -> None:
    assert cluster.missing == {"absent": "no-such-program"}
    assert set(cluster.services) == {"web"}


def test_a_service_cannot_depend_on_one_that_cannot_run(tmp_path: Path) -> None:
    path = tmp_path / "docker-compose.yml"
    path.write_text(
        "services:\n"
        "  gone: {image: x, command: [no-such-program]}\n"
        "  left: {image: x, command: [sleep, 60], depends_on: {gone: {condition: service_started}}}\n"
    )
    with pytest.raises(ComposeError, match="left depends on gone"):
        ComposeCluster(path, volumes=tmp_path, environment={})


def test_a_service_that_ends_at_once_fails_the_start_with_its_log_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "docker-compose.yml"
    path.write_text(
        "services: {bad: {image: x, command: [sh, -c, 'echo the reason; exit 3'], healthcheck: {test: [CMD, 'false']}}}"
    )
    cluster = ComposeCluster(path, volumes=tmp_path, environment={})
    with pytest.raises(ServiceFailed, match="the reason"), cluster:
        pass
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert cluster.host("bad").namespace not in namespaces
    assert "attnstore-compose-" not in Path("/proc/mounts").read_text()


def test_a_service_that_others_wait_for_until_it_has_ended_ends_before_them_or_fails_the_start(tmp_path: Path) -> None:
    path = tmp_path / "docker-compose.yml"
    text = (
        "services:\n"
        "  maker: {image: x, volumes: ['made:/made'], command: [sh, -c, 'sleep 1; echo it > /made/it; exit STATUS']}\n"
        "  user: {image: x, volumes: ['made:/made'], command: [sh, -c, 'cat /made/it && sleep 60'], stop_grace_period: 1s,\n"
        "    depends_on: {maker: {condition: service_completed_successfully}}}\n"
    )
    path.write_text(text.replace("STATUS", "0"))
    with ComposeCluster(path, volumes=tmp_path / "volumes", environment={}) as cluster:
        assert eventually(lambda: cluster.log("user") == "it\n")
    path.write_text(text.replace("STATUS", "3"))
    with pytest.raises(ServiceFailed, match="maker"), ComposeCluster(path, volumes=tmp_path / "volumes", environment={}):
        pass
