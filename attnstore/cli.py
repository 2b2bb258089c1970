"""The `attnstore` command.

Owns: the commands and their options. Every command but `serve` needs the packages of a client only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from attnstore.address import NODE_ADDRESS_DEFAULT
from attnstore.client.health import check_serving
from attnstore.client.options import Target, checked_target
from attnstore.command_line import CommandParser, run_command, say, tell
from attnstore.directory import Intent, load_cluster_key
from attnstore.environment import variable, variable_name
from attnstore.errors import InvalidArgument
from attnstore.extras import needs_extra
from attnstore.limits import NODE_ID_CHARS_MAX, QUOTA_BYTES_MAX, TENANT_CHARS_MAX
from attnstore.operations import Access, ClusterStatus, cluster_status, set_intent, set_quota, status_text, wait_drained
from attnstore.option_types import (
    MILLISECONDS,
    SECONDS,
    Name,
    Parsed,
    Size,
    bearer_token,
    file_to_read,
    file_to_write,
    folder_to_read,
    http_proxy,
    http_url,
)
from attnstore.spill.check import check as check_spill
from attnstore.whatif.command import add_plan_options, run_plan

_CLEAR_SCREEN = "\x1b[2J\x1b[H"
_TARGET_DEFAULT = f"grpc://{NODE_ADDRESS_DEFAULT}"
_TARGET = Parsed(checked_target)
_QUOTA = Size(0, QUOTA_BYTES_MAX)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0; 1 if a wait timed out or a node or worker did not answer; 2 if the command
    could not be executed. A line on standard error explains any other status than 0.
    """

    def run() -> int | None:
        arguments = create_parser().parse_args(argv)
        status: int | None = arguments.run(arguments)
        return status

    return run_command("attnstore", run, interrupted=0)


def create_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="attnstore", description="AttnStore: a network Attention store for LLM inference.")
    parser.add_argument("--version", action="version", version=f"attnstore {version('attnstore')}")
    commands = parser.add_subparsers(dest="command", required=True)

    serve_parser = commands.add_parser("serve", help="run a store node", description="Run a store node until SIGTERM.")
    serve_parser.add_late = _add_serve

    plan_parser = commands.add_parser(
        "plan",
        help="estimate the cost of moving KV on other hardware",
        description="Estimate whether a network can hold a model's KV.",
    )
    add_plan_options(plan_parser)
    plan_parser.set_defaults(run=run_plan)
    health = commands.add_parser("health", help="check that a node serves", description="Exit with status 0 if the node serves.")
    health.add_argument("target", type=Parsed(_node), metavar="URL", help="for example grpc://127.0.0.1:7400")
    health.add_argument(
        "--deadline-ms", type=MILLISECONDS, default=2_000.0, metavar="MS", help="longest wait for the answer (default 2000)"
    )
    health.add_argument("--tls-ca", type=file_to_read, metavar="FILE", help="PEM file of trusted authorities, for grpcs://")
    _add_http_proxy(health)
    health.set_defaults(run=_health)

    status = commands.add_parser(
        "status",
        help="show a node, or the nodes of a cluster",
        description="Show the state of every node. The exit status is 0 if every node and every named worker answered.",
    )
    status.add_argument(
        "target",
        type=_TARGET,
        nargs="?",
        metavar="URL",
        help=f"a node, nodes or a directory (default --directory, else {_TARGET_DEFAULT})",
    )
    status.add_argument("--watch", nargs="?", type=SECONDS, const=2.0, metavar="S", help="repeat every S seconds (default 2)")
    status.add_argument(
        "--worker",
        action="append",
        type=http_url,
        default=[],
        metavar="URL",
        help="also show the links and costs that this worker measured; repeatable",
    )
    status.add_argument(
        "--worker-token",
        type=bearer_token,
        metavar="TOKEN",
        default=variable("worker_token"),
        help="token for the workers [env ATTNSTORE_WORKER_TOKEN]",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object, or one per line with --watch")
    status.set_defaults(run=_status)

    drain = commands.add_parser("drain", help="hand a node's pages over and take it out of placement")
    drain.add_argument(
        "--wait", type=SECONDS, metavar="S", help="wait at most S seconds until the drain is done; exit status 1 if it is not"
    )
    drain.set_defaults(run=lambda arguments: _ask(arguments, Intent.DRAIN))
    undrain = commands.add_parser("undrain", help="make a drained or evicted node an ordinary member again")
    undrain.set_defaults(run=lambda arguments: _ask(arguments, None))
    evict = commands.add_parser("evict", help="remove a faulty node at once, without handing its pages over")
    evict.set_defaults(run=lambda arguments: _ask(arguments, Intent.EVICT))
    quota = commands.add_parser("quota", help="limit the bytes of a tenant's pages on all nodes together")
    quota.add_argument("tenant", type=Name(TENANT_CHARS_MAX), metavar="TENANT")
    quota.add_argument("size", type=_quota_bytes, metavar="SIZE", help="for example 10GiB, copies counted; none removes the limit")
    quota.set_defaults(run=_quota)
    for command in (drain, undrain, evict):
        command.add_argument("node", type=Name(NODE_ID_CHARS_MAX), metavar="NODE", help="its id, as attnstore status shows it")
    for command in (status, drain, undrain, evict, quota):
        _add_access(command)
    cluster_key = commands.add_parser(
        "cluster-key",
        help="make the key of a cluster",
        description="Make the file of a cluster's key unless it exists, and print the public key for clients' directory URLs.",
    )
    cluster_key.add_argument(
        "file", type=_key_file, metavar="FILE", help="file for attnstore serve --cluster-key, readable by its owner only"
    )
    cluster_key.add_argument("--public", type=file_to_write, metavar="FILE", help="also write the public key to this file")
    cluster_key.set_defaults(run=_cluster_key)
    spill_commands = commands.add_parser("spill", help="verify pages on a disk").add_subparsers(dest="spill_command", required=True)
    spill_check = spill_commands.add_parser(
        "check",
        help="read and verify every page of a spill directory",
        description="Read and verify every page of a spill directory that no node uses. The exit status is 1 if one is damaged.",
    )
    spill_check.add_argument("folder", type=folder_to_read, metavar="DIR", help="the directory; nothing in it is changed")
    spill_check.add_argument("--json", action="store_true", help="print one JSON object")
    spill_check.set_defaults(run=_spill_check)
    return parser


def _add_serve(parser: CommandParser) -> None:
    with needs_extra("node", "attnstore serve"):
        from attnstore.config import add_serve_options
        from attnstore.serve_command import run_serve
    add_serve_options(parser)
    parser.set_defaults(run=run_serve)


def _add_access(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--directory", type=_TARGET, metavar="URL", help="the cluster's directory [env ATTNSTORE_DIRECTORY]")
    add(
        "--cluster-key",
        type=file_to_read,
        metavar="FILE",
        default=variable("cluster_key"),
        help="the cluster's key, which signs the request [env ATTNSTORE_CLUSTER_KEY]",
    )
    add("--token", type=bearer_token, default=variable("token"), help="token for the nodes [env ATTNSTORE_TOKEN]")
    add("--tls-ca", type=file_to_read, metavar="FILE", help="PEM certificates of the nodes' authorities; default: the system's")
    add("--deadline-ms", type=MILLISECONDS, default=2_000.0, metavar="MS", help="longest wait for a node (default 2000)")
    _add_http_proxy(parser)


def _add_http_proxy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--http-proxy",
        type=http_proxy,
        metavar="URL",
        help="use this HTTP proxy (default: none; proxies of the environment are ignored)",
    )


def _access(arguments: argparse.Namespace, target: str | None = None, default: str | None = None) -> Access:
    target = target or arguments.directory or _directory_variable() or default
    if target is None:
        raise InvalidArgument("--directory is missing: the URL of the cluster's directory, for example redis://HOST:6379/0")
    return Access(target, arguments.token, arguments.tls_ca, arguments.deadline_ms, arguments.http_proxy, arguments.cluster_key)


def _directory_variable() -> str | None:
    """Returns the variable's value. It is not the option's default, because an explicit target takes precedence over it."""
    value = variable("directory")
    try:
        return None if value is None else _TARGET(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{variable_name('directory')}: {error}") from None


def _quota_bytes(text: str) -> int | None:
    return None if text == "none" else _QUOTA(text)


def _node(text: str) -> str:
    Target.parse(text)
    return text


def _key_file(text: str) -> Path:
    return file_to_read(text) if os.path.exists(text) else file_to_write(text)


def _cluster_key(arguments: argparse.Namespace) -> int:
    public = load_cluster_key(arguments.file, create=True).public
    if arguments.public is not None:
        try:
            arguments.public.write_text(f"{public}\n")
        except OSError as error:
            raise InvalidArgument(f"--public {arguments.public} cannot be written: {error.strerror}") from None
    say(str(public))
    return 0


def _spill_check(arguments: argparse.Namespace) -> int:
    report = check_spill(arguments.folder)
    say(json.dumps(report.to_json()) if arguments.json else report.to_text())
    if not report.is_whole:
        tell("attnstore", f"{arguments.folder} is damaged: what is damaged is a miss, and never a wrong page")
    return 0 if report.is_whole else 1


def _health(arguments: argparse.Namespace) -> int:
    check_serving(arguments.target, deadline_ms=arguments.deadline_ms, tls_ca=arguments.tls_ca, http_proxy=arguments.http_proxy)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.target is not None and arguments.directory is not None:
        raise InvalidArgument("URL and --directory exclude each other")
    access = _access(arguments, arguments.target, default=_TARGET_DEFAULT)
    while True:
        status = asyncio.run(cluster_status(access, arguments.worker, arguments.worker_token))
        if arguments.json:
            say(json.dumps(status.to_json()))
        else:
            say(f"{_CLEAR_SCREEN if arguments.watch else ''}{status_text(status)}")
        if arguments.watch is None:
            return _told_unanswered(status)
        time.sleep(arguments.watch)


def _told_unanswered(status: ClusterStatus) -> int:
    """Reports which nodes and workers did not answer, and returns the exit status."""
    for name, error in status.unanswered():
        tell("attnstore", f"{name} did not answer: {error}")
    if not status.nodes:
        tell("attnstore", f"{status.target} knows no node")
    return 0 if status.nodes and not status.unanswered() else 1


def _quota(arguments: argparse.Namespace) -> int:
    asyncio.run(set_quota(_access(arguments), arguments.tenant, arguments.size))
    return 0


def _ask(arguments: argparse.Namespace, intent: Intent | None) -> int:
    access = _access(arguments)
    asyncio.run(set_intent(access, arguments.node, intent))
    if intent is Intent.DRAIN and arguments.wait is not None:
        reason = asyncio.run(wait_drained(access, arguments.node, arguments.wait))
        if reason is not None:
            tell("attnstore", reason)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
