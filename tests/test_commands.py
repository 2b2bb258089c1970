"""The commands in an operator's scripts: their defaults, and their exit statuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import pytest

from attnstore.cli import main
from attnstore.testing import RedisServer, StoreProcess
from tests.samples import eventually

NOBODY = "127.0.0.1:1"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Run(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> Done: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, in an environment with only the test's variables."""

    def run_here(*arguments: str, **environment: str) -> Done:
        with monkeypatch.context() as patched:
            for name in ("ATTNSTORE_TOKEN", "ATTNSTORE_DIRECTORY"):
                patched.delenv(name, raising=False)
            for name, value in environment.items():
                patched.setenv(name, value)
            try:
                status = main(arguments)
            except SystemExit as refused:
                status = int(refused.code or 0)
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    return run_here


def is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture(scope="module")
def guarded() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "1MiB", "--token", "s3cret") as node:
        yield node


def test_status_asks_the_node_that_serve_starts(run: Run) -> None:
    shown = run("status", "--deadline-ms", "500", "--json")
    [node] = json.loads(shown.stdout)["nodes"]
    assert node["url"] == "grpc://127.0.0.1:7400"
    assert shown.returncode == (0 if node["error"] is None else 1)


@pytest.mark.parametrize("by", ["argument", "option", "variable"])
def test_status_takes_its_node_from_an_argument_an_option_or_a_variable(run: Run, store_url: str, by: str) -> None:
    given = {"argument": [store_url], "option": ["--directory", store_url], "variable": []}[by]
    variables = {"ATTNSTORE_DIRECTORY": store_url} if by == "variable" else {}
    shown = run("status", "--json", *given, **variables)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [(node["url"], node["error"]) for node in json.loads(shown.stdout)["nodes"]] == [(store_url, None)]


def test_an_argument_goes_before_the_variable_and_not_beside_the_option(run: Run, store_url: str) -> None:
    assert run("status", store_url, ATTNSTORE_DIRECTORY="redis://127.0.0.1:1/0").returncode == 0
    both = run("status", store_url, "--directory", "redis://:s3cret@127.0.0.1:1/0")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr
    assert "s3cret" not in both.stderr


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_status_names_every_node_that_did_not_answer(run: Run, store_url: str, arguments: tuple[str, ...]) -> None:
    shown = run("status", f"{store_url},{NOBODY}", "--deadline-ms", "2000", *arguments)
    assert shown.returncode == 1
    assert f"grpc://{NOBODY} did not answer" in shown.stderr
    assert store_url not in shown.stderr
    assert store_url in shown.stdout, "what did answer is shown"


@pytest.mark.parametrize("token", [(), ("--token", "wrong")])
def test_a_node_that_refuses_the_token_did_not_answer(run: Run, guarded: StoreProcess, token: tuple[str, ...]) -> None:
    shown = run("status", guarded.url, *token)
    assert shown.returncode == 1
    assert f"{guarded.url} did not answer: Unauthenticated" in shown.stderr
    assert run("status", guarded.url, "--token", "s3cret").returncode == 0


@pytest.mark.parametrize(
    "target", ["nonsense", "http://127.0.0.1:7400", "grpc://", "grpc://a:1,,b:2", "grpc://a:1?copies=2", "a:1"]
)
def test_a_target_that_is_none_is_refused_in_one_line(run: Run, target: str) -> None:
    for shown in (run("status", target), run("status", "--directory", target), run("status", ATTNSTORE_DIRECTORY=target)):
        assert shown.returncode == 2, shown
        assert is_one_line(shown.stderr), shown.stderr


@pytest.mark.redis
def test_an_empty_cluster_is_no_answer(run: Run) -> None:
    with RedisServer() as directory:
        shown = run("status", directory.url)
    assert shown.returncode == 1
    assert "knows no node" in shown.stderr


def test_a_directory_that_does_not_answer_is_an_error(run: Run) -> None:
    for command in (("status",), ("drain", "ada"), ("undrain", "ada"), ("evict", "ada"), ("quota", "ada", "1GiB")):
        shown = run(*command, "--directory", f"redis://{NOBODY}/0")
        assert shown.returncode == 2, command
        assert is_one_line(shown.stderr), shown.stderr


def await_members(run: Run, url: str, *names: str) -> None:
    """A node listens before it is a member."""
    assert eventually(lambda: all(name in run("status", "--json", url).stdout for name in names), within_s=60.0)


@pytest.mark.redis
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_waiting_for_a_drain_fails_when_the_node_leaves_before_it_is_done(run: Run, end: signal.Signals) -> None:
    with RedisServer() as directory, ExitStack() as stack:
        member = ("--capacity", "1MiB", "--directory", directory.url, "--node-id")
        node, _ = (stack.enter_context(StoreProcess(*member, name)) for name in ("ada", "bob"))
        await_members(run, directory.url, "ada", "bob")
        # A node without another node to hand its pages to never becomes drained.
        assert run("evict", "bob", "--directory", directory.url).returncode == 0
        command = [sys.executable, "-m", "attnstore.cli", "drain", "ada", "--wait", "30", "--directory", directory.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
            while "draining" not in run("status", "--json", directory.url).stdout:
                assert waiting.poll() is None
            node.process.send_signal(end)
            assert waiting.wait(60) == 1
            assert waiting.stderr is not None
            assert "ada has left, and had not said" in waiting.stderr.read()


@pytest.mark.redis
def test_a_drain_that_takes_longer_than_the_wait_says_so(run: Run) -> None:
    with RedisServer() as directory, StoreProcess("--capacity", "1MiB", "--directory", directory.url, "--node-id", "ada"):
        await_members(run, directory.url, "ada")
        shown = run("drain", "ada", "--wait", "0.1", "--directory", directory.url)
    assert (shown.returncode, is_one_line(shown.stderr)) == (1, True)
    assert "within 0.1 s" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("serve", "--token", ""), "--token"),
        (("serve", "--arena-path="), "--arena-path"),
        (("status", "--directory", ""), "--directory"),
        (("status", ""), "status"),
        (("health", ""), "health"),
        (("drain", "ada", "--directory", "redis://h/0", "--token="), "--token"),
        (("quota", "", "1GiB", "--directory", "redis://h/0"), "quota"),
    ],
)
def test_an_empty_value_is_refused_by_name(run: Run, arguments: tuple[str, ...], named: str) -> None:
    shown = run(*arguments)
    assert shown.returncode == 2
    assert shown.stderr.splitlines()[-1].endswith(f"{named} is empty")


def test_empty_variables_are_not_set(run: Run, store_url: str) -> None:
    assert run("status", store_url, ATTNSTORE_TOKEN="", ATTNSTORE_DIRECTORY="").returncode == 0
    missing = run("drain", "ada", ATTNSTORE_DIRECTORY="")
    assert missing.returncode == 2
    assert "--directory is missing" in missing.stderr


def test_a_node_in_kubernetes_says_which_variables_it_ignores(run: Run) -> None:
    environment = {"ATTNSTORE_METRICS_PORT": "tcp://10.0.0.1:9400", "ATTNSTORE_TOKEN": "", "ATTNSTORE_ARENA_PATH": ""}
    with StoreProcess("--capacity", "1MiB", "--log-format", "json", environment=environment) as node:
        assert run("status", node.url).returncode == 0, "no token is asked for"
        node.stop()
    first = json.loads(node.log.splitlines()[0])
    assert (first["level"], first["variable"], first["value"]) == ("warning", "ATTNSTORE_METRICS_PORT", "tcp://10.0.0.1:9400")
    assert "Kubernetes" in first["event"]


@pytest.mark.parametrize(
    "option", [("--watch", "0"), ("--watch", "-1"), ("--watch", "nan"), ("--deadline-ms", "-1"), ("--deadline-ms", "x")]
)
def test_times_that_are_none_are_refused(run: Run, store_url: str, option: tuple[str, str]) -> None:
    shown = run("status", store_url, *option)
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr


def test_health_says_in_its_status_whether_a_node_serves(run: Run, store_url: str) -> None:
    assert run("health", store_url).returncode == 0
    for arguments in ((f"grpc://{NOBODY}",), ("nonsense",), (store_url, "--deadline-ms=0"), (store_url, "--deadline-ms=nan")):
        shown = run("health", *arguments)
        assert shown.returncode == 2
        assert is_one_line(shown.stderr), shown.stderr
