"""No output shows any part of a password written unescaped in a directory's URL, whatever else the URL then seems to mean."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest

import attnstore
from attnstore import aio, cli
from attnstore.directory import DirectoryUrl, open_directory
from attnstore.errors import AttnStoreError
from attnstore_worker import cli as worker_cli
from attnstore_worker.vllm.settings import Settings

PART = ("sEcA", "sEcB", "sEcC")
"""Parts of a password that must not be shown: these, separated by characters with a meaning in a URL."""
BETWEEN = [
    "@",
    "/",
    "#",
    "?",
    ":",
    "[",
    "]",
    "%",
    "&",
    "=",
    "+",
    ",",
    ";",
    " ",
    "'",
    '"',
    "\\",
    "\n",
    "\t",
    "://",
    "\u2100",
    "\uff05",
    "é",
    "%zz",
]
SPLITS = ("@", "/", "#", "?", "/0?cluster=", "?ca=", "/0?sentinel_password=", "@h:1/", ":1/", ":1/0#", "\n", "[")
PASSWORDS = [PART[0] + one + PART[1] + two + PART[2] for one in BETWEEN for two in SPLITS]
FORMS = [
    "redis://:{}@h:1/0",
    "redis://ada:{}@h:1/0",
    "rediss://{}@h:1",
    "redis+sentinel://ada:{}@h:1,i:2/store/0",
    "redis+cluster://:{}@h:1,i:2",
    "redis+sentinel://h:1/store/0?sentinel_password={}",
    "Redis://:{}@h:1/0",
    "redis:/:{}@h:1/0",
    "rediss+sentinal://ada:{}@h:1",
    "grpc://ada:{}@h:1",
    "http://ada:{}@h:1",
]
FEW = [form.format(password) for form in FORMS for password in PASSWORDS[:: len(PASSWORDS) // 12]]


def seen(text: str) -> list[str]:
    return [part for part in PART if part in text]


def told(door: Callable[[], object]) -> str:
    """Returns everything that an entry point outputs: standard output, log lines, and the exception as printed."""
    out, lines = io.StringIO(), logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(lines)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                out.write(repr(door()))
            except AttnStoreError:
                out.write(traceback.format_exc())
            except SystemExit:
                pass
    finally:
        logging.getLogger().removeHandler(lines)
    return out.getvalue() + lines.stream.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_no_url_that_is_parsed_or_refused_shows_a_part_of_its_password(form: str) -> None:
    leaks = {}
    for password in PASSWORDS:
        url = form.format(password)
        text = told(lambda url=url: (parsed := DirectoryUrl.parse(url), parsed.shown))
        if found := seen(text):
            leaks[url] = (found, text)
    assert leaks == {}


def _serve(url: str) -> object:
    return cli.main(["serve", "--listen", "127.0.0.1:0", "--capacity", "1MiB", "--metrics-port", "-1", "--directory", url])


def _name(url: str) -> object:
    async def name() -> str:
        directory = open_directory(url)
        await directory.close()
        return directory.name

    return asyncio.run(name())


def _connect(url: str) -> object:
    with attnstore.connect(url) as client:
        return client


def _connect_asynchronously(url: str) -> object:
    async def connect() -> object:
        async with aio.connect(url) as client:
            return client

    return asyncio.run(connect())


DOORS: dict[str, Callable[[str], object]] = {
    "open_directory": _name,
    "connect": _connect,
    "connect, a list": lambda url: attnstore.connect(f"grpc://a:1,{url}"),
    "aio.connect": _connect_asynchronously,
    "serve": _serve,
    "serve, at the wrong option": lambda url: cli.main(["serve", "--listen", url]),
    "serve, as an address": lambda url: cli.main(["serve", "--directory", "redis://h", "--advertise", url]),
    "serve, without an option": lambda url: cli.main(["serve", url]),
    "status, a mistyped option": lambda url: cli.main(["status", f"--directry={url}", "--tokn", PART[0]]),
    "status, at the wrong option": lambda url: cli.main(["status", "--deadline-ms", url]),
    "health": lambda url: cli.main(["health", url, "--deadline-ms", "1"]),
    "no command": lambda url: cli.main([url]),
    "drain": lambda url: cli.main(["drain", "ada", "--directory", url.replace("h:1", "127.0.0.1:1")]),
    "status": lambda url: cli.main(["status", url.replace("h:1", "127.0.0.1:1"), "--deadline-ms", "1"]),
    "status of a worker": lambda url: cli.main(["status", "grpc://127.0.0.1:1", "--deadline-ms", "1", "--worker", url]),
    "vllm": lambda url: Settings.parse({"store": url, "token": PART[0]}),
    "vllm, wrong": lambda url: Settings.parse({"store": [url], "token": [PART[0]]}),
    "worker, no command": lambda url: worker_cli.main([url]),
    "worker, without an option": lambda url: worker_cli.main(["generate", "--prompt-file", "-", url]),
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_shows_a_part_of_a_password(door: str) -> None:
    leaks = {}
    for url in FEW:
        text = told(lambda url=url: DOORS[door](url))
        if found := seen(text):
            leaks[url] = (found, text)
    assert leaks == {}


@pytest.mark.parametrize("separator", ["/", "?", "#"])
def test_a_workers_url_is_refused_if_its_password_looks_like_a_port_and_a_path(separator: str) -> None:
    text = told(lambda: DOORS["status of a worker"](f"http://ada:7{separator}{PART[0]}@127.0.0.1:1"))
    assert "--worker" in text
    assert seen(text) == []


@pytest.mark.parametrize(
    "command",
    [
        ("attnstore.cli", "serve", "--listen", "127.0.0.1:0", "--capacity", "1MiB"),
        ("attnstore.cli", "status"),
        ("attnstore.cli", "drain", "ada"),
        ("attnstore_worker.cli", "generate", "--prompt-file", "/dev/null"),
    ],
)
@pytest.mark.parametrize("url", ["redis://:p@sEcA/sEcB#1@host", "redis://:[sEcA/sEcB]@host/0", "redis://u:sEcA℀sEcB@host/0?x=sEcC"])
def test_no_process_shows_a_part_of_a_password_or_ends_in_a_traceback(command: tuple[str, ...], url: str) -> None:
    option = () if command[0] == "attnstore_worker.cli" else ("ATTNSTORE_DIRECTORY",)
    arguments = ("--store", url) if command[0] == "attnstore_worker.cli" else ()
    ended = subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        env={**os.environ, **dict.fromkeys(option, url)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert seen(ended.stdout + ended.stderr) == []
    assert "Traceback" not in ended.stderr
