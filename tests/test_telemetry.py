"""Logs say what went wrong and never what it was about: no token, no page, no local variable."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from attnstore.telemetry import configure_logs


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def fail_with(secret: str) -> None:
    assert secret
    raise RuntimeError("the cause")


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_an_exception_is_logged_without_the_values_of_its_frames(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure_logs("info", log_format)
    try:
        fail_with("".join(["s3", "cret"]))
    except RuntimeError:
        structlog.get_logger().exception("call failed", rpc="Read")
    shown = capsys.readouterr().err
    assert "RuntimeError: the cause" in shown
    assert "fail_with" in shown
    assert "s3cret" not in shown
    if log_format == "json":
        assert json.loads(shown)["event"] == "call failed"


def test_lines_below_the_level_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", "json")
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["loud"]
