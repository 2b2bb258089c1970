"""The cluster of docker-compose.yml, run by that file, and the tour that the documentation describes."""

from __future__ import annotations

import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from experiments.compose_local import ComposeCluster
from experiments.walkthrough import dashboard_queries
from tests.volumes import seed_models

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RUN_S_MAX = 240.0

pytestmark = [pytest.mark.netns, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeCluster]:
    volumes = tmp_path_factory.mktemp("volumes")
    seed_models(volumes / "models")
    environment = {
        **os.environ,
        "ATTNSTORE_TOKEN": "of-this-test",
        "GRAFANA_PASSWORD": "of-this-test",
        "ATTNSTORE_NODE_CAPACITY": "256MiB",
        "ATTNSTORE_WORKER_THREADS": "1",
        **dict.fromkeys(("WORKER1_PORT", "WORKER2_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0"),
    }
    with ComposeCluster(ROOT / "docker-compose.yml", volumes=volumes, environment=environment) as cluster:
        yield cluster
    shutil.rmtree(volumes)


def test_only_services_whose_programs_this_machine_lacks_are_missing(cluster: ComposeCluster) -> None:
    assert set(cluster.missing) == {name for name in ("grafana", "prometheus") if shutil.which(name) is None}


@pytest.mark.needs("prometheus")
def test_two_workers_share_pages_through_three_nodes_and_every_panel_has_data(cluster: ComposeCluster) -> None:
    status, told = cluster.run_once("walkthrough", RUN_S_MAX)
    assert status == 0, told
    assert told.endswith("all as it should be\n")


def test_alerts_and_dashboard_ask_for_metrics_that_exist(cluster: ComposeCluster) -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    asked = [*dashboard_queries(DEPLOY / "grafana" / "dashboards" / "attnstore.json"), *(rule["expr"] for rule in alerts)]
    # A histogram has several series under its name.
    series = {name for expression in asked for name in re.findall(r"\battnstore_\w+", expression)}
    names = {re.sub("_(bucket|count|sum)$", "", name) for name in series}
    assert len(names) > 15
    assert names <= offered(f"http://{cluster.published('worker1', 8000)}") | node_metrics(cluster)


def offered(endpoint: str) -> set[str]:
    with urllib.request.urlopen(f"{endpoint}/metrics", timeout=10) as answer:
        return help_names(answer.read().decode())


def help_names(text: str) -> set[str]:
    return set(re.findall(r"^# HELP (\S+)", text, flags=re.MULTILINE))


def node_metrics(cluster: ComposeCluster) -> set[str]:
    """Nodes publish no port, so their metrics are read from inside."""
    with cluster.host("prometheus").entered():
        connection = urllib.request.urlopen(f"http://{cluster.host('store1').address}:9400/metrics", timeout=10)
    with connection as answer:
        return help_names(answer.read().decode())
