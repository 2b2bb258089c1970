"""No value of any option of either command ends in a traceback: it is accepted, or refused in one line that names the option."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from attnstore.config import load_serve_options
from attnstore.errors import InvalidArgument
from tests.command_options import NONSENSE, PROGRAMS, Option, Outcome, World, commands, options, outcome, outcome_of_variables
from tests.fuzz_command_lines import fuzz

OPTIONS = options()
VALUED = [option for option in OPTIONS if option.kind is not bool]
SERVE = [option for option in OPTIONS if (option.program, option.command) == ("attnstore", "serve")]
TOGETHER = {"--tls-cert": "--tls-key", "--tls-key": "--tls-cert"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path / "world" if (tmp_path / "world").mkdir() is None else tmp_path)
    monkeypatch.chdir(world.folder)
    for name in [name for name in os.environ if name.startswith("ATTNSTORE_")]:
        monkeypatch.delenv(name)
    return world


def is_in_order(done: Outcome) -> bool:
    """Returns whether a line was accepted silently, or refused in one printable line."""
    if done.status == 0:
        return done.told == ""
    return (
        done.status == 2 and done.said == "" and done.told[:-1].isprintable() and done.told[-1] == "\n" and len(done.told) < 4_000
    )


def names(done: Outcome, option: Option) -> bool:
    return option.flag in done.told or (option.positional and "is empty" in done.told)


def line(world: World, option: Option, value: str) -> list[str]:
    found = world.line(option, value)
    if option.flag in TOGETHER and option.command == "serve":
        found.insert(1, f"{TOGETHER[option.flag]}={world.file}")
    return found


def test_options_of_every_command_are_found() -> None:
    found = {(option.program, option.command) for option in OPTIONS}
    assert found >= {(program, command) for program in PROGRAMS for command in commands(program)}
    assert len(VALUED) > 100


@pytest.mark.parametrize("option", VALUED, ids=str)
def test_a_bad_value_is_refused_in_one_line_by_the_options_name(world: World, option: Option) -> None:
    left = sorted(world.folder.rglob("*"))
    for value in world.bad(option):
        done = outcome(option.program, line(world, option, value))
        assert (done.status, is_in_order(done), names(done, option)) == (2, True, True), (value[:200], done)
    assert sorted(world.folder.rglob("*")) == left, "looking leaves nothing behind"


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_good_value_is_not_refused(world: World, option: Option) -> None:
    left = sorted(world.folder.rglob("*"))
    for value in [None] if option.kind is bool else world.good(option):
        done = outcome(option.program, world.line(option, None) if value is None else line(world, option, value))
        assert (done.status, done.told) == (0, ""), (value, done)
    assert sorted(world.folder.rglob("*")) == left


@pytest.mark.parametrize("option", VALUED, ids=str)
def test_nonsense_is_taken_or_refused_in_order(world: World, option: Option) -> None:
    for value in NONSENSE:
        done = outcome(option.program, line(world, option, value))
        assert is_in_order(done), (value[:200], done)
        assert done.status == 0 or names(done, option), (value[:200], done)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.variable is not None], ids=str)
def test_a_variable_is_read_as_its_option_is(world: World, option: Option, monkeypatch: pytest.MonkeyPatch) -> None:
    assert option.variable is not None
    rest = [each for each in world.line(option, None) if not each.startswith(option.flag)]
    good = ["true"] if option.kind is bool else world.good(option)[:2]
    bad = ["perhaps"] if option.kind is bool else world.bad(option)[1:]
    if option.flag == "--directory" and option.command != "serve":
        pytest.skip("a target goes before it, so that it is read last: see test_commands")
    for value, status in (*((value, 0) for value in good), *((value, 2) for value in bad), ("", 0)):
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            continue
        if "\0" in value or len(value) > 100_000:
            continue
        environment = {option.variable: value}
        if value and option.flag in TOGETHER:
            environment[f"ATTNSTORE_{TOGETHER[option.flag][2:].replace('-', '_').upper()}"] = str(world.file)
        with monkeypatch.context() as patched:
            for name, each in environment.items():
                patched.setenv(name, each)
            done = outcome_of_variables(option.program, rest, environment)
        assert (done.status, is_in_order(done)) == (status, True), (value, done)
        assert status == 0 or option.flag in done.told, (value, done)


@pytest.mark.parametrize("option", [option for option in SERVE if option.flag != "--config"], ids=str)
def test_a_line_of_a_file_is_read_as_its_option_is(world: World, option: Option) -> None:
    path = world.folder / "options.toml"
    texts = [] if option.kind is bool else [each for each in world.bad(option) if each.isprintable()]
    for value in (*map(json.dumps, texts), "nan", "-inf", "[]", "{}", "[[1]]", "1979-05-27", "{a = 1}"):
        path.write_text(f"{option.flag[2:]} = {value}\n", encoding="utf-8")
        done = outcome("attnstore", ["serve", f"--config={path}"])
        assert (done.status, is_in_order(done), option.flag in done.told) == (2, True, True), (value, done)


@pytest.mark.parametrize("content", [b"\xff", b"a = " + b"[" * 100_000, b"\0", b"lissten = 1", b'"a\\nb" = 1', b"[node]\na=1"])
def test_a_file_that_is_none_is_refused_in_one_line(world: World, content: bytes) -> None:
    path = world.folder / "options.toml"
    path.write_bytes(content)
    for flag in ("--config", "--tokens-file"):
        done = outcome("attnstore", ["serve", f"{flag}={path}"])
        if flag == "--config":
            assert (done.status, is_in_order(done)) == (2, True), done


def test_option_lists_that_make_no_sense_are_taken_or_refused_in_order(world: World) -> None:
    fuzz(world, random.Random(18), 300)


def process(module: str, *arguments: str, stdin: bytes = b"", stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        ("attnstore.cli", ["drain", "ada", "--wait", "nan", "--directory", "redis://h/0"], b"--wait"),
        ("attnstore.cli", ["serve", "--replicas", "\udcff"], b"--replicas"),
        ("attnstore_worker", ["generate", "--prompt-file", "-", "--logits", "/nowhere/logits"], b"--logits"),
    ],
)
def test_a_process_refuses_in_one_line_with_status_2(module: str, arguments: list[str], named: bytes) -> None:
    done = process(module, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done
    assert named in done.stderr


def test_standard_input_that_is_no_text_is_refused_before_the_model_is_loaded() -> None:
    done = process("attnstore_worker", "generate", "--prompt-file", "-", stdin=b"abc\xff")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done
    assert b"--prompt-file: standard input is not UTF-8" in done.stderr


def test_a_reader_that_has_gone_is_not_told_and_a_full_disk_is() -> None:
    for arguments in (["plan", "--list"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = process("attnstore.cli", *arguments, stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b""), arguments
        with open("/dev/full", "wb") as full:
            done = process("attnstore.cli", *arguments, stdout=full.fileno())
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done
        assert b"standard output cannot be written" in done.stderr


def test_a_secret_of_any_option_is_in_no_refusal(world: World) -> None:
    for option in VALUED:
        for value in ("redis://:s3cret@h:x", "s3c\nret s3cret@h", "grpc://ada:s3cret@h", "s3cret://h"):
            done = outcome(option.program, line(world, option, value))
            assert "s3cret" not in done.told, (str(option), done)
    for program in PROGRAMS:
        for arguments in (["redis://:s3cret@h", ""], ["status", "redis://:s3cret@h", ""], ["status", "--to=s3c s3cret"]):
            assert "s3cret" not in outcome(program, arguments).told


def test_what_is_read_before_does_not_depend_on_the_environment_alone() -> None:
    with pytest.raises(InvalidArgument, match="--weight"):
        load_serve_options(commands("attnstore")["serve"].parse_args([]), {"ATTNSTORE_WEIGHT": "nan"})
