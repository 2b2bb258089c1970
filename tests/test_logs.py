"""Logs report errors without any content of users, and never write to the standard output of a program that uses the library."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from attnstore.logs import get_logger
from attnstore.server.log_output import configure_logs

_log = get_logger("attnstore.example")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # a new configuration would close pytest's own handlers
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def fail_with(secret: str) -> None:
    assert secret
    raise RuntimeError("the cause")


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_an_exception_is_logged_without_the_values_of_its_frames(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure_logs("info", log_format)
    try:
        fail_with("".join(["s3", "cret"]))
    except RuntimeError:
        _log.exception("call failed", rpc="Read")
    shown = capsys.readouterr().err
    assert "RuntimeError: the cause" in shown
    assert "fail_with" in shown
    assert "s3cret" not in shown
    if log_format == "json":
        line = json.loads(shown)
        assert (line["event"], line["level"], line["rpc"]) == ("call failed", "error", "Read")


def test_lines_below_the_level_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", "json")
    _log.info("quiet")
    _log.warning("loud")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["loud"]


def test_lines_of_other_libraries_are_shown_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", "json")
    logging.getLogger("other").warning("%d of %d", 1, 2)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"]) == ("1 of 2", "warning")


def test_a_line_for_people_has_time_level_event_and_fields_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "console")
    _log.info("page refused", node="ada", count=3, before="a\nb", address="[::1]:7400")
    time, shown = capsys.readouterr().err.split(" ", 1)
    assert datetime.fromisoformat(time).tzinfo is UTC
    assert shown == f"[info     ] {'page refused':30} address=[::1]:7400 before='a\\nb' count=3 node=ada\n"


def test_a_line_for_machines_has_a_value_that_json_lacks_as_its_repr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    _log.info("page refused", hash=b"\xff", pages=3)
    line = json.loads(capsys.readouterr().err)
    assert datetime.fromisoformat(line.pop("timestamp")).tzinfo is UTC
    assert line == {"level": "info", "event": "page refused", "hash": repr(b"\xff"), "pages": 3}


def test_a_program_with_its_own_logging_gets_our_lines_with_their_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "attnstore"):
        logging.getLogger().addHandler(caplog.handler)
        _log.info("node left alone 100%", node="ada", count=3)
    assert caplog.messages == ["node left alone 100% node='ada' count=3"]


def test_without_a_configuration_warnings_go_to_standard_error_and_nothing_to_standard_output() -> None:
    program = (
        "from attnstore.logs import get_logger; log = get_logger('attnstore.x'); log.info('quiet'); log.warning('loud', node='ada')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "loud node='ada'\n")
