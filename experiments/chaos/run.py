"""One run: the cluster of docker-compose.yml under load, with faults, and all observations.

Owns: the order of events. Invariant: the load begins after the cluster is healthy and ends before the cluster does, and every fault
ends before the next begins.
"""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from experiments.chaos.faults import WARM_UP_S, Fault, FaultKind, plan_faults
from experiments.chaos.observation import Call, Healed, Verdict, judge
from experiments.compose_local import ComposeCluster
from experiments.compose_local.compose_file import Mount, Service
from experiments.compose_local.container import Container
from experiments.compose_local.executables import PROJECT
from experiments.endpoints import complete, model_name

WORKERS: Final = ("worker1", "worker2")
STORES: Final = ("store1", "store2", "store3")
CLIENTS: Final = 4
_TOKENS: Final = 12
_ANSWER_S: Final = 30.0
"""The time limit of a worker's answer: computing a whole prompt on a busy machine takes a few seconds."""
_REFERENCE_S_MAX: Final = 300.0
_RESTART_S_MAX: Final = 60.0
_END_S_MAX: Final = 30.0
_POLL_S: Final = 0.2
_LOG_CHARACTERS: Final = 2_000
_GREEDY: Final = "greedy"
_GREEDY_QUOTA_BYTES: Final = 96 << 20
_TENANTS_FILE: Final = "/etc/attnstore/tenants.toml"

Report = Callable[[str], None]


def cluster_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns variables of docker-compose.yml for a run: small pools, so that workers depend on the store, and unusual ports."""
    ports = dict.fromkeys(("WORKER1_PORT", "WORKER2_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
    token = secrets.token_hex(16)
    return {
        **environment,
        **ports,
        "ATTNSTORE_TOKEN": token,
        "ATTNSTORE_WORKER_TOKEN": secrets.token_hex(16),
        "GRAFANA_PASSWORD": secrets.token_hex(16),
        "ATTNSTORE_NODE_CAPACITY": "512MiB",
        "ATTNSTORE_WORKER_POOL": "64MiB",
        "ATTNSTORE_WORKER_THREADS": "1",
    }


def run_chaos(seed: int, run_s: float, volumes: Path, environment: Mapping[str, str], report: Report) -> Verdict:
    """Runs the warm-up and `run_s` seconds of load with the faults of `seed`."""
    load_s = WARM_UP_S + run_s
    calls: list[Call] = []
    healed: list[Healed] = []
    with ExitStack() as stack:
        report("computing the reference texts, without a store, while the cluster starts")
        reference = _begin_reference(stack)
        variables = cluster_environment(environment)
        tenants = Tenants(Path(stack.enter_context(tempfile.TemporaryDirectory())), variables["ATTNSTORE_TOKEN"])
        cluster = stack.enter_context(
            ComposeCluster(
                PROJECT / "docker-compose.yml", volumes=volumes, environment=variables, change=tenants.admitted, report=report
            )
        )
        tenants.limit(cluster)
        texts = _texts_of(reference)
        began_s = time.monotonic()
        clients = [_begin_client(stack, cluster, number, seed, load_s) for number in range(CLIENTS)]
        token = variables["ATTNSTORE_WORKER_TOKEN"]
        urls = {name: f"http://{cluster.published(name, 8000)}" for name in WORKERS}
        loads = [WorkerLoad(name, url, token, texts, began_s + load_s, seed) for name, url in urls.items()]
        for fault in plan_faults(seed, run_s):
            _sleep_until(began_s + fault.at_s)
            report(f"{time.monotonic() - began_s:5.1f} s: {fault.service} is {fault.kind} for {fault.for_s} s")
            healed.append(_endure(cluster, fault, tenants, calls) if fault.kind.is_caller else _suffer(cluster, fault))
            if fault.kind is FaultKind.KILLED and not cluster.is_healthy(fault.service):
                report(f"{fault.service} does not become healthy again:\n{cluster.log(fault.service)[-_LOG_CHARACTERS:]}")
            report(f"{time.monotonic() - began_s:5.1f} s: {fault.service} is back")
        _sleep_until(began_s + load_s)
        for load in loads:
            calls += load.finish()
        for client in clients:
            client.wait(_END_S_MAX)
            calls += _calls_in(client)
    return judge(seed, run_s, began_s, calls, healed)


class Tenants:
    """The tenants of the nodes: `default`, whose workers and clients are observed, and a greedy one."""

    def __init__(self, folder: Path, token: str) -> None:
        self._file = folder / "tenants.toml"
        self._greedy_token = secrets.token_hex(16)
        self._file.write_text(f'default = "{token}"\n{_GREEDY} = "{self._greedy_token}"\n')
        folder.chmod(0o755)  # nodes run as another user
        self._file.chmod(0o644)

    def admitted(self, service: Service) -> Service:
        """Returns a store's service with both tenants in place of the single token; other services unchanged."""
        if service.name not in STORES:
            return service
        environment = {name: value for name, value in service.environment.items() if name != "ATTNSTORE_TOKEN"}
        environment["ATTNSTORE_TOKENS_FILE"] = _TENANTS_FILE
        mounts = (*service.mounts, Mount(str(self._file), _TENANTS_FILE, True))
        return replace(service, environment=environment, mounts=mounts)

    def limit(self, cluster: ComposeCluster) -> None:
        """Sets the greedy tenant's quota, as an operator would. Raises `subprocess.TimeoutExpired`."""
        command = ("attnstore", "quota", f"--directory={_directory(cluster)}", _GREEDY, str(_GREEDY_QUOTA_BYTES))
        done = cluster.begin(STORES[0], command=command)
        if done.wait(_END_S_MAX) != 0:
            raise RuntimeError(f"the greedy tenant's quota was not taken:\n{done.log[-_LOG_CHARACTERS:]}")

    def environment(self, kind: FaultKind) -> dict[str, str]:
        """The additional environment variables of a misbehaving caller."""
        return {"ATTNSTORE_TOKEN": self._greedy_token} if kind is FaultKind.GREEDY else {}


class WorkerLoad:
    """Requests known texts from one worker, without a pause, until `end_s` on the monotonic clock."""

    def __init__(self, name: str, url: str, token: str, texts: Mapping[str, str], end_s: float, seed: int) -> None:
        self._name = name
        self._url = url
        self._token = token
        self._texts = dict(texts)
        self._end_s = end_s
        self._draws = random.Random(f"{seed} {name}")
        self._model = model_name(url, token)
        self._calls: list[Call] = []
        self._thread = threading.Thread(target=self._run, name=f"load-{name}", daemon=True)
        self._thread.start()

    def finish(self) -> list[Call]:
        """Waits for the last answer. Returns all calls."""
        self._thread.join(_ANSWER_S + _END_S_MAX)
        return self._calls

    def _run(self) -> None:
        prompts = list(self._texts)
        while time.monotonic() < self._end_s:
            self._calls.append(self._ask(self._draws.choice(prompts)))

    def _ask(self, prompt: str) -> Call:
        began_s = time.monotonic()
        asked = hits = wrong = 0
        error: str | None = None
        try:
            answer = complete(self._url, self._token, self._model, prompt, tokens=_TOKENS, timeout_s=_ANSWER_S)
            asked, hits = answer.prompt_tokens, answer.cached_tokens
            wrong = int(answer.text != self._texts[prompt])
        except (OSError, urllib.error.URLError) as raised:
            error = type(raised).__name__
        return Call(self._name, "complete", began_s, time.monotonic(), _ANSWER_S, asked, hits, wrong, error)


def _begin_reference(stack: ExitStack) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.chaos.reference", f"--tokens={_TOKENS}"]
    process = stack.enter_context(subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


def _texts_of(reference: subprocess.Popen[str]) -> dict[str, str]:
    printed, _ = reference.communicate(timeout=_REFERENCE_S_MAX)
    if reference.returncode != 0:
        raise RuntimeError(f"the reference texts were not computed: exit status {reference.returncode}")
    texts: dict[str, str] = json.loads(printed)
    return texts


def _begin_client(stack: ExitStack, cluster: ComposeCluster, number: int, seed: int, load_s: float) -> Container:
    name = f"client{number + 1}"
    client = cluster.begin("client", f"--name={name}", f"--seed={seed * CLIENTS + number}", f"--seconds={load_s}")
    stack.callback(client.kill)
    return client


def _endure(cluster: ComposeCluster, fault: Fault, tenants: Tenants, calls: list[Call]) -> Healed:
    """Runs a misbehaving caller until its time is over; calls that it reports count like those of others."""
    began_s = time.monotonic()
    caller = cluster.begin(
        "client",
        f"--seconds={fault.for_s}",
        command=(
            *("python", "-m", "experiments.chaos.caller", fault.kind.value, f"--directory={_directory(cluster)}"),
            *(argument for argument in cluster.command("client") if argument.startswith("--store=")),
            f"--nodes={','.join(f'{name}:7400' for name in STORES)}",
        ),
        environment=tenants.environment(fault.kind),
    )
    try:
        status = caller.wait(fault.for_s + _END_S_MAX)
    finally:
        caller.kill()
    calls += _calls_in(caller)
    if status != 0:
        raise RuntimeError(f"the {fault.kind.value} caller failed:\n{caller.log[-_LOG_CHARACTERS:]}")
    return Healed(fault, began_s, time.monotonic())


def _calls_in(client: Container) -> list[Call]:
    return [Call.from_line(line) for line in client.log.splitlines() if line.startswith("{")]


def _directory(cluster: ComposeCluster) -> str:
    return cluster.services[STORES[0]].environment["ATTNSTORE_DIRECTORY"]


def _suffer(cluster: ComposeCluster, fault: Fault) -> Healed:
    """Causes a fault, waits, and ends it."""
    began_s = time.monotonic()
    match fault.kind:
        case FaultKind.KILLED:
            cluster.kill(fault.service)
            _sleep_until(began_s + fault.for_s)
            cluster.start(fault.service)
            deadline_s = time.monotonic() + _RESTART_S_MAX
            while not cluster.is_healthy(fault.service) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
        case FaultKind.CUT_OFF:
            cluster.cut(fault.service)
            _sleep_until(began_s + fault.for_s)
            cluster.mend(fault.service)
        case FaultKind.FROZEN:
            cluster.freeze(fault.service)
            _sleep_until(began_s + fault.for_s)
            cluster.thaw(fault.service)
    return Healed(fault, began_s, time.monotonic())


def _sleep_until(then_s: float) -> None:
    time.sleep(max(0.0, then_s - time.monotonic()))
