"""The part of `valkey-cli` that health checks use, for machines with only the server: `[-h HOST] [-p PORT] COMMAND...`."""

from __future__ import annotations

import argparse
import sys

import redis


def main() -> int:
    """Sends one command and prints the answer. Returns 1 if there is none."""
    parser = argparse.ArgumentParser("valkey-cli", add_help=False)
    parser.add_argument("-h", dest="host", default="127.0.0.1")
    parser.add_argument("-p", dest="port", type=int, default=6379)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        with redis.Redis(options.host, options.port, socket_timeout=2.0, decode_responses=True) as server:
            print(server.execute_command(*options.command))
    except redis.RedisError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
