"""The limit of memory: one core copies each page from one large buffer to another."""

from __future__ import annotations

from experiments.bandwidth.lane import Start, serve_lane
from experiments.bandwidth.pages import PageBuffers


class MemcpyLane:
    """A read without a network."""

    def __init__(self, start: Start) -> None:
        self._source = PageBuffers.filled(start.shape)
        self._destination = PageBuffers(start.shape)
        self.verbs = {"memcpy read": self._copy}
        self.landing = {"memcpy read": self._destination}

    def begin_pass(self) -> None:
        """No-op."""

    def _copy(self, begin: int, end: int) -> None:
        for index in range(begin, end):
            self._destination.views[index][:] = self._source.views[index]


if __name__ == "__main__":
    START = Start.from_arguments()
    serve_lane(MemcpyLane(START), START)
