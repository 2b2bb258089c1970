"""The cluster of docker-compose.yml, run by that file, and the tour that the documentation describes."""

from __future__ import annotations

import os
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
import yaml

from experiments.compose_local import ComposeCluster
from experiments.walkthrough import dashboard_queries
from tests.programs import why_absent
from tests.volumes import seed_models

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RUN_S_MAX = 240.0

pytestmark = [pytest.mark.netns, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_workers_share_pages_through_three_nodes_and_every_panel_has_data(tmp_path: Path) -> None:
    """One test, because a second process of pytest would start the cluster again."""
    seed_models(tmp_path / "models")
    environment = {
        **os.environ,
        "ATTNSTORE_TOKEN": "of-this-test",
        "GRAFANA_PASSWORD": "of-this-test",
        "ATTNSTORE_NODE_CAPACITY": "256MiB",
        "ATTNSTORE_WORKER_THREADS": "1",
        **dict.fromkeys(("WORKER1_PORT", "WORKER2_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0"),
    }
    with ComposeCluster(ROOT / "docker-compose.yml", volumes=tmp_path, environment=environment) as cluster:
        only_services_whose_programs_this_machine_lacks_are_missing(cluster)
        alerts_and_dashboard_ask_for_metrics_that_exist(cluster)
        if absent := why_absent("prometheus"):
            pytest.skip(f"the tour was not taken: {absent}")
        status, told = cluster.run_once("walkthrough", RUN_S_MAX)
        assert status == 0, told
        assert told.endswith("all as it should be\n")
    shutil.rmtree(tmp_path)


def only_services_whose_programs_this_machine_lacks_are_missing(cluster: ComposeCluster) -> None:
    assert set(cluster.missing) == {name for name in ("grafana", "prometheus") if shutil.which(name) is None}


def alerts_and_dashboard_ask_for_metrics_that_exist(cluster: ComposeCluster) -> None:
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
