"""The Kubernetes manifests, as kustomize renders them: valid, consistent, and matching the programs that they start."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUSTOMIZATIONS = ("base", "overlays/example-valkey-cluster", "overlays/gpu")
KUBERNETES = "1.33"
WITHOUT_SCHEMA = {"ServiceMonitor", "PrometheusRule"}
"""The Prometheus operator's own kinds: their schemas are not part of Kubernetes."""

Manifest = dict[str, Any]

pytestmark = pytest.mark.needs("kubectl")  # renders the manifests
each = pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)


@functools.cache
def rendered(kustomization: str) -> tuple[Manifest, ...]:
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / kustomization)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(kustomization: str, *kinds: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in rendered(kustomization) if manifest["kind"] in kinds}


def workloads(kustomization: str) -> dict[str, Manifest]:
    return of_kind(kustomization, "StatefulSet", "Deployment", "Job")


def pod(workload: Manifest) -> Manifest:
    template: Manifest = workload["spec"]["template"]
    return template


def containers(kustomization: str) -> Iterator[Manifest]:
    for workload in workloads(kustomization).values():
        yield from pod(workload)["spec"]["containers"]


def selected(kustomization: str, labels: dict[str, str]) -> list[Manifest]:
    """Returns the pods that a label selector matches."""
    pods = map(pod, workloads(kustomization).values())
    return [found for found in pods if labels.items() <= found["metadata"]["labels"].items()]


@each
def test_manifests_are_what_kubernetes_accepts(kustomization: str) -> None:
    for manifest in rendered(kustomization):
        if manifest["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_field_is_noticed() -> None:
    broken = dict(of_kind("base", "PodDisruptionBudget")["attnstore-node"])
    broken["spec"] = {**broken["spec"], "maxUnavailble": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@each
def test_every_selector_finds_pods(kustomization: str) -> None:
    for manifest in of_kind(kustomization, "Service").values():
        assert selected(kustomization, manifest["spec"]["selector"]), manifest["metadata"]["name"]
    for manifest in of_kind(kustomization, "PodDisruptionBudget", "StatefulSet", "Deployment").values():
        assert selected(kustomization, manifest["spec"]["selector"]["matchLabels"]), manifest["metadata"]["name"]
    for manifest in of_kind(kustomization, "NetworkPolicy").values():
        labels = manifest["spec"]["podSelector"].get("matchLabels", {})
        assert selected(kustomization, labels), manifest["metadata"]["name"]


@each
def test_ports_that_are_allowed_or_served_are_listened_on(kustomization: str) -> None:
    for manifest in of_kind(kustomization, "Service").values():
        listened = _ports(selected(kustomization, manifest["spec"]["selector"]))
        assert {port["port"] for port in manifest["spec"]["ports"]} <= listened
    for manifest in of_kind(kustomization, "NetworkPolicy").values():
        listened = _ports(selected(kustomization, manifest["spec"]["podSelector"].get("matchLabels", {})))
        allowed = {port["port"] for rule in manifest["spec"].get("ingress", ()) for port in rule["ports"]}
        assert allowed <= listened, manifest["metadata"]["name"]


@each
def test_monitors_scrape_named_ports_and_jobs_are_those_of_the_alerts(kustomization: str) -> None:
    services = of_kind(kustomization, "Service")
    monitors = of_kind(kustomization, "ServiceMonitor")
    assert set(monitors) == {"attnstore-node", "attnstore-worker"}
    for name, monitor in monitors.items():
        assert monitor["spec"]["selector"]["matchLabels"].items() <= services[name]["metadata"]["labels"].items()
        names = {port["name"] for port in services[name]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= names


@each
def test_the_alerts_are_those_of_compose(kustomization: str) -> None:
    (rule,) = of_kind(kustomization, "PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())


@each
def test_pods_run_without_root_and_without_rights(kustomization: str) -> None:
    for workload in workloads(kustomization).values():
        spec = pod(workload)["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert not spec["automountServiceAccountToken"]
        assert not spec["enableServiceLinks"], "a Service attnstore-metrics would set ATTNSTORE_METRICS_PORT"
    for container in containers(kustomization):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"], container["name"]


@each
def test_images_are_pinned(kustomization: str) -> None:
    for container in containers(kustomization):
        assert container["image"].partition(":")[2][:1].isdigit(), container["image"]


@each
def test_an_arena_leaves_its_process_room_below_the_memory_limit(kustomization: str) -> None:
    (node,) = pod(workloads(kustomization)["attnstore-node"])["spec"]["containers"]
    capacity = next(entry["value"] for entry in node["env"] if entry["name"] == "ATTNSTORE_CAPACITY")
    limit = node["resources"]["limits"]["memory"]
    assert int(capacity.removesuffix("GiB")) + 1 <= int(limit.removesuffix("Gi"))


@each
def test_nodes_are_spread_and_upgraded_one_at_a_time(kustomization: str) -> None:
    node = workloads(kustomization)["attnstore-node"]
    spread = {rule["topologyKey"]: rule["whenUnsatisfiable"] for rule in pod(node)["spec"]["topologySpreadConstraints"]}
    assert spread["kubernetes.io/hostname"] == "DoNotSchedule"
    assert of_kind(kustomization, "PodDisruptionBudget")["attnstore-node"]["spec"]["maxUnavailable"] == 1


def _ports(pods: list[Manifest]) -> set[int]:
    return {
        port["containerPort"] for found in pods for container in found["spec"]["containers"] for port in container.get("ports", ())
    }
