"""`python -m experiments.compose_local up | run SERVICE`: our docker-compose.yml without a container engine; needs root.

up             starts the services, prints where they are published, and ends them on Ctrl-C
run SERVICE    starts them, runs one more service until it ends (`run walkthrough`), ends them; its exit status
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnstore.command_line import CommandParser
from experiments.compose_local import ComposeCluster, ComposeError, ServiceFailed
from experiments.compose_local.compose_file import NOT_APPLIED
from experiments.compose_local.executables import PROJECT

_RUN_S_MAX = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 2 after an error message of one line on standard error."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began_s = time.monotonic()
    try:
        with ComposeCluster(
            arguments.file, volumes=arguments.volumes, profiles=arguments.profile, report=lambda line: print(line, flush=True)
        ) as cluster:
            print(f"all {len(cluster.services)} services are healthy after {time.monotonic() - began_s:.1f} s", flush=True)
            for name, program in cluster.missing.items():
                print(f"{name} is not running: this machine has no {program}")
            return _up(cluster) if arguments.command == "up" else _run(cluster, arguments.service, arguments.arguments)
    except (ComposeError, ServiceFailed) as error:
        print(f"compose_local: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    ignored = "; ".join(f"{key}: {why}" for key, why in NOT_APPLIED.items())
    parser = CommandParser("python -m experiments.compose_local", description=__doc__, epilog=f"Not applied: {ignored}.")
    parser.add_argument("--file", type=Path, default=PROJECT / "docker-compose.yml", help="default: the project's own")
    parser.add_argument("--profile", action="append", default=[], metavar="NAME", help="also start the services of this profile")
    parser.add_argument(
        "--volumes",
        type=Path,
        default=Path.home() / ".cache" / "attnstore" / "volumes",
        metavar="FOLDER",
        help="where the named volumes are kept (default: %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the services until Ctrl-C")
    run = commands.add_parser("run", help="start the services and run one more until it ends")
    run.add_argument("service")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="further arguments of its command")
    return parser


def _up(cluster: ComposeCluster) -> int:
    for service in cluster.services.values():
        for port in service.ports:
            print(f"{service.name}: http://{cluster.published(service.name, port.container_port)}")
    print("Ctrl-C ends them.", flush=True)
    signal.pause()
    return 0


def _run(cluster: ComposeCluster, service: str, arguments: Sequence[str]) -> int:
    status, printed = cluster.run_once(service, _RUN_S_MAX, *arguments)
    print(printed, end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
