"""`attnstore health` as a container's health check: the node's answer determines the exit status."""

from __future__ import annotations

import os
import signal

import pytest

from attnstore import cli
from attnstore.testing import StoreProcess


def test_a_node_that_serves_is_healthy_and_needs_no_token_to_say_so() -> None:
    with StoreProcess("--capacity", "64MiB", "--token", "secret") as node:
        assert cli.main(["health", node.url]) == 0


def test_a_node_that_is_gone_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with StoreProcess("--capacity", "64MiB") as node:
        node.kill()
        assert cli.main(["health", node.url]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_a_node_that_hangs_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with StoreProcess("--capacity", "64MiB") as node:
        os.kill(node.process.pid, signal.SIGSTOP)
        assert cli.main(["health", node.url, "--deadline-ms", "200"]) == 2
    assert "deadline_exceeded" in capsys.readouterr().err


def test_a_malformed_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", "127.0.0.1:7400"]) == 2
    assert "grpc://host:port" in capsys.readouterr().err
