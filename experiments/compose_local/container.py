"""One service as a process in namespaces of its own: files, processes, host name and network.

Owns: the process and its environment. Its files are this machine's, copy-on-write, with the service's mounts on top; files outside
a volume do not outlive it. Invariant: the process ends when `stop` or `kill` returns, and when this process ends. Linux only; needs
root, util-linux (`unshare`, `nsenter`, `setpriv`) and overlayfs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Final

from attnstore.testing.netns import Host
from experiments.compose_local.compose_file import Mount, Service
from experiments.compose_local.executables import CODE, PROGRAMS_PATH, PROJECT, command_of, provided_programs

_END_S_MAX: Final = 10.0


class Container:
    """A running service. `folder` is its own: it contains its log, and the files that it writes while it runs."""

    def __init__(self, service: Service, host: Host, folder: Path, volumes: Path, hosts_file: Path) -> None:
        self.service = service
        self._host = host
        self._root = folder / "layers" / "root"
        self._log = folder / "log"
        (folder / "layers").mkdir(parents=True, exist_ok=True)
        script = "\n".join([*self._mounts(folder / "layers", volumes, hosts_file), f"exec {self._entry()}"])
        isolated = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        with self._host.entered(), self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *isolated, "sh", "-euc", script],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def exit_status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """Returns its output, over all starts."""
        return self._log.read_text(errors="replace")

    def execute(self, command: tuple[str, ...], timeout_s: float) -> int:
        """Runs a command inside, as the service's user. Returns its exit status, or 124 if it took longer than `timeout_s`."""
        pid = self._inner_pid()
        if pid is None:
            return 1
        entered = ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", *self._privileges()]
        try:
            done = subprocess.run(
                [*entered, *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 124
        return done.returncode

    def wait(self, timeout_s: float) -> int:
        """Waits and returns the exit status. Raises `subprocess.TimeoutExpired`."""
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after the service's grace period."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(self.service.stop_grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Sends SIGKILL: the service ends without cleanup."""
        self._signal(signal.SIGKILL)
        try:
            # `unshare` ends when the service has ended and released everything, including its ports.
            self._process.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the service was not started yet
            self._process.wait(_END_S_MAX)

    def freeze(self) -> None:
        """Sends SIGSTOP: it keeps its connections and does not answer."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Sends SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        pid = self._inner_pid()
        if pid is not None:
            os.kill(pid, number)

    def _inner_pid(self) -> int | None:
        """Returns the pid of the service's own process, the child of `unshare`."""
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _environment(self) -> dict[str, str]:
        packages = f"{PROJECT}:{PROJECT / 'worker'}"
        return {"PATH": PROGRAMS_PATH, "PYTHONPATH": packages, "PYTHONUNBUFFERED": "1", "HOME": "/", **self.service.environment}

    def _mounts(self, layers: Path, volumes: Path, hosts_file: Path) -> list[str]:
        """Returns shell commands that mount the service's files below the root folder."""
        root = self._root
        lines = [
            f"mount -t tmpfs tmpfs {layers}",
            f"mkdir {layers}/changes {layers}/work {root}",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={layers}/changes,workdir={layers}/work {root}",
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs sysfs {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"hostname {self.service.name}",
        ]
        lines += [f"mkdir -p {root}{path} && mount -t tmpfs -o mode=1777 tmpfs {root}{path}" for path in self.service.tmpfs]
        for mount in [Mount(str(hosts_file), "/etc/hosts", True), *self.service.mounts]:
            lines += _bound(mount, volumes, root, self.service.user)
        for path in CODE:
            lines += _bound(Mount(path, path, True), volumes, root, self.service.user)
            # The interpreter may be in a home folder that only its owner may enter.
            lines += [f"chmod o+x {root}{parent}" for parent in Path(path).parents if str(parent) != "/"]
        for name, script in provided_programs().items():
            program = f"{root}/usr/local/sbin/{name}"
            lines.append(f"printf '#!/bin/sh\\n%s \"$@\"\\n' {shlex.quote(script)} > {program} && chmod 755 {program}")
        if self.service.read_only:
            lines.append(f"mount -o remount,ro {root}")
        return lines

    def _entry(self) -> str:
        inside = ["env", f"--chdir={self.service.working_dir}", *command_of(self.service)]
        return shlex.join(["chroot", str(self._root), *self._privileges(), *inside])

    def _privileges(self) -> list[str]:
        uid, _, gid = self.service.user.partition(":")
        drop = ["setpriv", "--no-new-privs", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups", "--inh-caps=-all"]
        if self.service.capabilities is None:
            return drop
        kept = [f"+{name.lower()}" for name in self.service.capabilities]
        return [*drop, f"--bounding-set={','.join(['-all', *kept])}"]


def _bound(mount: Mount, volumes: Path, root: Path, user: str) -> list[str]:
    """Returns shell commands that mount a file, a folder or a named volume below `root`."""
    target = f"{root}{mount.target}"
    lines = []
    if mount.is_volume:
        source = volumes / mount.source
        lines.append(f"mkdir -p {source} && chown {user} {source} && mkdir -p {target}")
    else:
        source = Path(mount.source)
        make = f"mkdir -p {target}" if source.is_dir() else f"mkdir -p {Path(target).parent} && touch {target}"
        lines.append(make)
    lines.append(f"mount --rbind {source} {target}")
    return [*lines, f"mount -o remount,bind,ro {target}"] if mount.read_only else lines
