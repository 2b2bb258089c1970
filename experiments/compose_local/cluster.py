"""The services of a compose file: started in order, watched, cut off and ended.

Owns: the network, the containers and their scratch folder. Invariant: only the volumes outlive the `with` block.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from attnstore.testing.netns import Host, Switch
from experiments.compose_local.compose_file import ComposeError, Service, load_compose_file
from experiments.compose_local.container import Container
from experiments.compose_local.executables import missing_program
from experiments.compose_local.published import PortRelay

_POLL_S: Final = 1.0
"""A look at a service's health starts a process in its container; services that start need the cores themselves."""
HEALTHY_S_MAX: Final = 180.0
"""A first start converts the model."""


class ServiceFailed(Exception):
    """A service ended, or did not become healthy; the message ends with its log."""


class ComposeCluster:
    """The services of `file` without a profile or with one of `profiles`. `missing` names those that this machine cannot run.

    `volumes` is the folder of the named volumes; `change` replaces an override file. A context manager: entering starts everything
    and returns once all are healthy. Raises `ComposeError` for a file that cannot be run here and `ServiceFailed`.
    """

    def __init__(
        self,
        file: Path,
        *,
        volumes: Path,
        profiles: Collection[str] = (),
        environment: Mapping[str, str] = os.environ,
        change: Callable[[Service], Service] = lambda service: service,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._all = {name: change(service) for name, service in load_compose_file(file, environment).items()}
        active = {name: service for name, service in self._all.items() if not service.profiles or service.profiles & set(profiles)}
        self.missing = {name: program for name, service in active.items() if (program := missing_program(service))}
        self.services = {name: service for name, service in active.items() if name not in self.missing}
        for service in self.services.values():
            if absent := set(service.depends_on) - set(self.services):
                raise ComposeError(f"{service.name} depends on {', '.join(sorted(absent))}, which cannot run here")
        self._volumes = volumes
        self._ends_by_itself = {
            other
            for service in self.services.values()
            for other, condition in service.depends_on.items()
            if condition == "service_completed_successfully"
        }
        self._report = report
        self._containers: dict[str, Container] = {}
        self._published: dict[tuple[str, int], str] = {}
        self._runs = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnstore-compose-")))
            self._volumes.mkdir(parents=True, exist_ok=True)
            self.switch = stack.enter_context(Switch())
            self._hosts = {name: self.switch.join(name) for name, service in self._all.items() if service.network_of is None}
            self._write_hosts_file()
            stack.callback(self._end_all)
            self._publish(stack.enter_context(PortRelay()))
            self._start_all()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """Returns where a service runs."""
        return self._hosts[self._all[name].network_of or name]

    def published(self, name: str, container_port: int) -> str:
        """Returns the `host:port` on this machine that leads to a service's port."""
        return self._published[name, container_port]

    def command(self, name: str) -> tuple[str, ...]:
        """Returns the command of a service, whether its profile is active or not."""
        return self._all[name].command

    def log(self, name: str) -> str:
        """Returns the output of a service."""
        return self._containers[name].log

    def start(self, name: str) -> None:
        """Starts a service, again if it has ended; does not wait for its health."""
        self._containers[name] = self._container(self.services[name], name)

    def stop(self, name: str) -> None:
        """Sends SIGTERM and, after the service's grace period, SIGKILL."""
        self._containers[name].stop()

    def kill(self, name: str) -> None:
        """Sends SIGKILL."""
        self._containers[name].kill()

    def freeze(self, name: str) -> None:
        """Stops a service without closing anything: it keeps its connections and does not answer."""
        self._containers[name].freeze()

    def thaw(self, name: str) -> None:
        """Ends a freeze."""
        self._containers[name].thaw()

    def cut(self, name: str) -> None:
        """Drops all packets from and to the service."""
        self.switch.cut(self.host(name))

    def mend(self, name: str) -> None:
        """Ends a cut."""
        self.switch.mend(self.host(name))

    def is_healthy(self, name: str) -> bool:
        """Runs the service's own health check; a service without one is healthy while it runs."""
        container = self._containers[name]
        if container.exit_status is not None:
            return False
        health = container.service.health
        return health is None or container.execute(health.command, health.timeout_s) == 0

    def begin(
        self, name: str, *arguments: str, command: tuple[str, ...] | None = None, environment: Mapping[str, str] | None = None
    ) -> Container:
        """Begins one more container of a service, with more arguments and variables, or another command; the caller waits for it or
        ends it.
        """
        service = self._all[name]
        self._runs += 1
        service = replace(
            service,
            command=(*(command or service.command), *arguments),
            environment={**service.environment, **(environment or {})},
        )
        return self._container(service, f"{name}-run-{self._runs}")

    def run_once(self, name: str, timeout_s: float, *arguments: str) -> tuple[int, str]:
        """Runs a service that ends by itself, with more arguments. Returns its exit status and output, as `docker compose run`
        does.

        Raises `subprocess.TimeoutExpired`, with the service ended.
        """
        container = self.begin(name, *arguments)
        try:
            return container.wait(timeout_s), container.log
        finally:
            container.kill()

    def _start_all(self) -> None:
        deadline_s = time.monotonic() + HEALTHY_S_MAX
        started_s: dict[str, float] = {}
        unhealthy = set(self.services)
        while unhealthy:
            for name in sorted(unhealthy - set(started_s)):
                if self._may_start(self.services[name], started_s, unhealthy):
                    self.start(name)
                    started_s[name] = time.monotonic()
            for name in sorted(unhealthy & set(started_s)):
                if name in self._ends_by_itself and self._containers[name].exit_status == 0:
                    unhealthy.remove(name)
                    self._report(f"{name} has ended after {time.monotonic() - started_s[name]:.1f} s")
                    continue
                if self._containers[name].exit_status is not None or time.monotonic() > deadline_s:
                    raise ServiceFailed(f"{name} did not become healthy:\n{self.log(name)}")
                if name not in self._ends_by_itself and self.is_healthy(name):
                    unhealthy.remove(name)
                    self._report(f"{name} is healthy after {time.monotonic() - started_s[name]:.1f} s")
            time.sleep(_POLL_S)

    @staticmethod
    def _may_start(service: Service, started: Collection[str], unhealthy: Collection[str]) -> bool:
        return all(
            other in started and (condition == "service_started" or other not in unhealthy)
            for other, condition in service.depends_on.items()
        )

    def _container(self, service: Service, folder: str) -> Container:
        return Container(service, self.host(service.name), self._scratch / folder, self._volumes, self._scratch / "hosts")

    def _write_hosts_file(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{host.address} {name}" for name, host in self._hosts.items())]
        (self._scratch / "hosts").write_text("\n".join(lines) + "\n")

    def _publish(self, relay: PortRelay) -> None:
        for service in self.services.values():
            for port in service.ports:
                address = relay.publish(port.address, self.host(service.name), port.container_port)
                self._published[service.name, port.container_port] = str(address)

    def _end_all(self) -> None:
        """Ends all services, the last one started first, even if one fails to end."""
        with ExitStack() as stack:
            for container in self._containers.values():
                if container.exit_status is None:
                    stack.callback(container.stop)
