"""The command as a user runs it: a process, with and without a store node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnstore import memory_limit
from attnstore.testing import StoreProcess
from attnstore_worker.cli import main
from attnstore_worker.engine import EngineOptions

PROMPT = "The store keeps pages. " * 40
OPTIONS = ("--threads", "1", "--pool", "8MiB")
"""The default pool would be cleared before every run: half a gigabyte."""


def worker(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnstore_worker.cli", "generate", *OPTIONS, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ})


def report(*options: str | Path) -> dict[str, Any]:
    finished = worker(*options, "--json")
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    return file


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("generate", "--prompt-tokens", ("-1", "0", "x")),
        ("generate", "--max-tokens", ("0", "1.5")),
        ("generate", "--threads", ("0", "-1", "100000")),
        ("generate", "--flush-ms", ("-1",)),
        ("generate", "--store-deadline-ms", ("0", "-1", "99999999999999999999")),
        ("generate", "--chunk-tokens", ("0",)),
        ("serve", "--port", ("-1", "65536")),
        ("serve", "--sequences", ("0",)),
        ("serve", "--prefetch", ("-1",)),
        ("serve", "--waiting", ("0",)),
        ("explain", "--last", ("0", "-1")),
    ],
)
def test_a_number_that_would_mean_something_else_is_refused(
    command: str, option: str, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"generate": ["--prompt-file", "-"], "serve": [], "explain": ["--from", os.devnull]}[command]
    for value in values:
        assert main([command, *needed, f"{option}={value}"]) == 2
        assert f"argument {option}: {value!r} is not a whole number" in capsys.readouterr().err


def test_pools_that_the_kernel_would_kill_the_worker_for_are_refused(
    tiny_folder: Path,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory_limit, "MEMBERSHIP", tmp_path / "membership")
    options = ["generate", "--prompt-file", str(prompt_file), "--max-tokens", "1"]
    (tmp_path / "config.json").write_text("no model, as would be seen if it were read")
    for pools in (["--pool", "65MiB"], ["--pool", "32MiB", "--host-pool", "33MiB"]):
        assert main([*options, "--model", str(tmp_path), *pools]) == 2
        assert "takes 65.0MiB, and the memory that this process may use is 64.0MiB" in capfd.readouterr().err
    assert main([*options, "--model", str(tiny_folder), "--pool", "32MiB"]) == 0
    assert "may not leave enough" in caplog.text
    assert main([*options, "--model", str(tiny_folder), "--pool", "90%"]) == 2
    assert "a pool of 90% of the 0B that cpu has free cannot hold one page" in capfd.readouterr().err


def test_a_pool_that_is_a_share_of_free_memory_holds_a_prompt(tiny_folder: Path, prompt_file: Path) -> None:
    finished = worker("--model", tiny_folder, "--prompt-file", prompt_file, "--max-tokens", "1", "--pool", "1%", "--device", "cpu")
    assert finished.returncode == 0, finished.stderr


def test_a_second_process_reads_what_the_first_wrote(
    tiny_folder: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", tiny_folder, "--prompt-file", prompt_file, "--max-tokens", "8", "--ignore-stop")

    def here(*more: str) -> dict[str, Any]:
        """The report of a worker in this process, without cached pages."""
        assert main(["generate", *OPTIONS, *map(str, options), "--json", *more]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    with StoreProcess("--capacity", "64MiB") as node:
        cold = report(*options, "--store", node.url)
        warm = report(*options, "--store", node.url)
        in_place = here("--store", node.url, "--shared", "in-place", "--host-pool", "1MiB")
    control = here()
    assert cold["store_error"] is warm["store_error"] is None
    assert cold["pages_not_written"] == 0
    assert cold["tokens"] == warm["tokens"] == control["tokens"]
    assert len(control["tokens"]) == 8
    assert (cold["hit_tokens"], control["hit_tokens"]) == (0, 0)
    assert warm["hit_tokens_remote"] == (warm["prompt_tokens"] - 1) // 16 * 16
    page_bytes = 2 * 2 * 2 * 16 * 32 * 4
    assert warm["bytes_read"] == warm["hit_tokens"] // 16 * page_bytes
    assert cold["bytes_written"] == (cold["prompt_tokens"] + 7) // 16 * page_bytes
    assert warm["bytes_written"] == 0, "its own last block was there already, too"
    assert warm["hit_tokens_by_tier"] == {"hbm": 0, "host": 0, "shared": warm["hit_tokens"], "remote": 0}
    assert in_place["tokens"] == warm["tokens"]
    assert (in_place["hit_tokens_by_tier"]["shared"], in_place["bytes_read"]) == (warm["hit_tokens"], 0)
    assert in_place["kv_bytes_used"] == warm["kv_bytes_used"] - warm["bytes_read"], "the node's pages are not the pool's"
    assert control["kv_bytes_used"] < control["kv_bytes_contiguous"] == 512 // 16 * page_bytes


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(node, *options, TOKEN=..., TENANT_SALT=...)` returns the report of a worker in this process without cached pages."""

    def run(node: StoreProcess, *options: str, **environment: str) -> dict[str, Any]:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(f"ATTNSTORE_{name}", value)
            prompt = ("--prompt-file", str(prompt_file), "--max-tokens", "4", "--ignore-stop")
            assert main(["generate", *OPTIONS, "--model", str(tiny_folder), *prompt, "--json", "--store", node.url, *options]) == 0
        written = capsys.readouterr()
        assert "pepper" not in written.out + written.err
        result: dict[str, Any] = json.loads(written.out)
        assert result["store_error"] is None
        return result

    return run


def test_a_worker_on_a_device_with_memory_of_its_own_gives_the_same_tokens(run: Run) -> None:
    device = ("--device", "simulated", "--dtype", "fp32")
    with StoreProcess("--capacity", "64MiB") as node:
        cold = run(node, *device, "--host-pool", "1MiB")
        warm = run(node, *device)
        on_the_cpu = run(node, "--device", "cpu")
    assert cold["tokens"] == warm["tokens"] == on_the_cpu["tokens"]
    assert (cold["hit_tokens"], cold["pages_not_written"]) == (0, 0)
    assert warm["hit_tokens_remote"] == on_the_cpu["hit_tokens_remote"] == (warm["prompt_tokens"] - 1) // 16 * 16


def test_two_tenants_of_one_model_each_hit_what_they_wrote_themselves(run: Run, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('ada = "adas"\nbob = "bobs"\n')
    with StoreProcess("--capacity", "64MiB", "--tokens-file", str(tokens)) as node:
        reports = [run(node, TOKEN=token) for token in ("adas", "bobs", "adas", "bobs")]
    assert [report["hit_tokens"] > 0 for report in reports] == [False, False, True, True]
    assert len({tuple(report["tokens"]) for report in reports}) == 1
    assert all(report["pages_not_written"] == 0 for report in reports)


def test_workers_share_pages_with_those_of_their_own_salt_alone(run: Run) -> None:
    with StoreProcess("--capacity", "64MiB") as node:
        reports = [
            run(node),
            run(node, "--tenant-salt", "pepper"),
            run(node, TENANT_SALT="pepper"),
            run(node, TENANT_SALT="pepper2"),
            run(node, TENANT_SALT=""),
        ]
    assert [report["hit_tokens"] > 0 for report in reports] == [False, False, True, False, True]
    assert "pepper" not in repr(EngineOptions(tenant_salt=b"pepper"))


def test_a_store_that_is_not_there_costs_a_warning_only(
    tiny_folder: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--model", str(tiny_folder), "--prompt-file", str(prompt_file), "--max-tokens", "4", "--json")
    assert main(["generate", *OPTIONS, *options, "--store", "grpc://127.0.0.1:1"]) == 0
    assert json.loads(capsys.readouterr().out)["store_error"] is not None
    assert "the store failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt-file", "/nowhere/prompt.txt"), "cannot be read"),
        (("--model", "/nowhere/model"), "--model: '/nowhere/model' is not there"),
        (("--pool", "1KiB"), "cannot hold one page"),
        (("--chunk-tokens", "7"), "--chunk-tokens: '7' is not a whole number from 16"),
        (("--store", "http://somewhere"), "http://somewhere"),
    ],
)
def test_a_bad_option_is_one_line_on_standard_error(
    tiny_folder: Path, prompt_file: Path, options: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(tiny_folder), "--prompt-file", str(prompt_file), *options]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    lines = written.err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attend", "always"), "--attend always needs a --store"),
        (("--attend", "measured", "--store", "grpc://127.0.0.1:1"), "--attend measured needs --planner cost"),
        (("--store", "grpc://127.0.0.1:1", "--store-ca", os.devnull), "does not use TLS"),
        (("--store", "grpc://127.0.0.1:1", "--transport", "tcp", "--http-proxy", "http://h:1"), "goes past an HTTP proxy"),
        (("--pool", "63TiB"), "--pool, with --host-pool, takes 63.0TiB"),
        (("--device", "cuda:777"), "cuda:777 cannot be used: "),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_model_is_loaded(
    tmp_path: Path, prompt_file: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("no model, as would be seen if it were read")
    assert main(["generate", "--model", str(tmp_path), "--prompt-file", str(prompt_file), *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_full_disk_costs_the_file_and_not_a_traceback(
    tiny_folder: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["generate", *OPTIONS, "--model", str(tiny_folder), "--prompt-file", str(prompt_file), "--max-tokens", "1"]
    assert main([*command, "--logits", "/dev/full"]) == 2
    told = capsys.readouterr().err
    assert "--logits /dev/full cannot be written" in told
    assert told.count("\n") == 1
    assert main([*command, "--planner", "cost", "--store", "grpc://127.0.0.1:1", "--decisions", "/dev/full"]) == 0
    assert "--decisions /dev/full cannot be written: No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("serve", "--store", ""), "--store"), (("serve", "--model="), "--model"), (("explain", "--from", ""), "--from")],
)
def test_an_empty_value_is_refused_by_name(arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{named} is empty")


def test_text_goes_to_standard_output_and_the_costs_to_standard_error(
    tiny_folder: Path, prompt_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(tiny_folder), "--prompt-file", str(prompt_file), "--max-tokens", "4", "--chat")
    assert main(["generate", *OPTIONS, *options]) == 0
    written = capfd.readouterr()
    assert "TTFT" in written.err
    assert "TTFT" not in written.out
