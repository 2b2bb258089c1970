"""`make test` on a machine with only what the README requires: tests that cannot run say so, and none fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import minimal_machine, programs

ROOT = Path(__file__).parents[1]
WITHOUT = ("apt", "apt-get", "cc", "chromium", "docker", "docker-compose", "gcc", "ip", "kubectl", "openssl", "prometheus", "tc")


@pytest.fixture
def minimal() -> Iterator[dict[str, str]]:
    with minimal_machine.environment() as environment:
        yield {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'worker'}"}


def run(environment: dict[str, str], *command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_machine_is_minimal(minimal: dict[str, str]) -> None:
    assert [program for program in WITHOUT if shutil.which(program, path=minimal["PATH"])] == []
    for program in ("sh", "python3", "make", "git", "mktemp", "diff"):
        assert shutil.which(program, path=minimal["PATH"]), f"{program} is not on this machine, and the README asks for it"
    assert run(minimal, sys.executable, "-m", "tests.minimal_machine", "python3", "-c", "print('here')").stdout == "here\n"


def test_continuous_integration_is_no_kinder_than_a_users_machine() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "exec make test"]


def test_make_test_sets_itself_up_and_asks_for_no_package_of_the_system(minimal: dict[str, str], tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = run(minimal, "make", "-n", "test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for needed in ("-m venv .venv", "pip install", "-m tests.programs", "-m pytest"):
        assert needed in done.stdout
    assert "apt" not in done.stdout


def test_programs_that_cannot_be_had_are_named_in_one_line_and_fail_nothing(minimal: dict[str, str]) -> None:
    done = run(minimal, sys.executable, "-m", "tests.programs")
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    assert "prometheus" in line
    assert line.endswith("tests that use them are skipped, and say so")


APT = {
    "works": f"for package in $*; do [ $package != prometheus ] || cp {sys.executable} $(dirname $0)/promtool; done",
    "fails": "exit 100",
    "hangs": "sleep 600",
}


@pytest.mark.parametrize("apt", APT)
def test_the_packages_of_debian_are_asked_for_where_that_can_help(
    minimal: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], apt: str
) -> None:
    calls = tmp_path / "calls"
    script = Path(minimal["PATH"], "apt-get")
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{APT[apt]}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", minimal["PATH"])
    monkeypatch.setattr(programs, "_APT_S_MAX", 0.5 if apt == "hangs" else 30)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert programs.main() == 0
    assert not calls.exists(), "only root may install"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert programs.main() == 0
    asked = calls.read_text().splitlines()
    assert asked[0].endswith("update")
    assert {line.rpartition(" ")[2] for line in asked[1:]} == {"docker-compose", "iproute2", "openssl", "prometheus", "util-linux"}
    *_, told = capsys.readouterr().out.splitlines()
    assert "prometheus, " in told
    assert ("promtool" in told) is (apt != "works")


@pytest.mark.slow
def test_no_test_of_what_the_machine_lacks_fails_and_each_says_what_that_is(minimal: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    concerned = [f"deploy/test_{name}.py" for name in ("chaos_run", "compose", "kubernetes", "monitoring", "walkthrough")]
    concerned += [f"cluster/test_{name}.py" for name in ("compose_local", "shaped_links", "switch", "tls")]
    concerned += ["experiments/test_report.py::test_the_page_opens_in_a_browser_without_an_error_and_with_every_picture"]
    options = ("-p", "no:cacheprovider", "-q", f"--junitxml={report}")
    done = run(minimal, sys.executable, "-m", "pytest", *options, *(f"tests/{path}" for path in concerned))
    assert done.returncode == 0, done.stdout[-5_000:]
    skipped: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if (found := case.find("skipped")) is not None:
            skipped.setdefault(case.get("classname", "").rpartition(".")[2], set()).add(found.get("message", ""))
    reasons = {reason for told in skipped.values() for reason in told}
    assert all("is not installed" in reason or "need root" in reason for reason in reasons), reasons
    assert skipped.keys() == {path.partition(".py")[0].rpartition("/")[2] for path in concerned}


def test_a_service_whose_program_is_not_there_is_missing_and_no_other(minimal: dict[str, str]) -> None:
    ask = """
from experiments.compose_local.compose_file import load_compose_file
from experiments.compose_local.executables import PROJECT, missing_program
services = load_compose_file(PROJECT / "docker-compose.yml", {"ATTNSTORE_TOKEN": "a", "GRAFANA_PASSWORD": "b"})
print(*sorted(name for name, service in services.items() if not service.profiles and missing_program(service)))
"""
    assert run(minimal, sys.executable, "-c", ask).stdout.split() == ["grafana", "prometheus"]
