"""The pool of bulk connections: the end of an exchange decides whether its connection is reused, and none is leaked."""

from __future__ import annotations

import pytest

from attnstore.client.calls import Transfer
from attnstore.client.transports.channel_pool import ChannelPool
from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import ClientClosed, InvalidArgument, ProtocolError, Unavailable


class Channel:
    def __init__(self) -> None:
        self.answered = True
        self.closed = 0

    def begin(self, _deadline: Deadline) -> None: ...

    def shutdown(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


class Pool:
    def __init__(self) -> None:
        self.opened: list[Channel] = []
        self.pool = ChannelPool[Channel](self._connect)

    def _connect(self, _deadline: Deadline) -> Channel:
        self.opened.append(Channel())
        return self.opened[-1]

    def exchange(self, error: BaseException | None = None) -> None:
        def run(_channel: Channel) -> None:
            if error is not None:
                raise error

        self.pool.exchange(Deadline(MonotonicClock(), 1_000), Transfer(), run)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), Unavailable("lost"), ProtocolError("odd"), InvalidArgument("wrong")], ids=repr
)
def test_whatever_an_exchange_raises_its_connection_is_closed_and_forgotten(error: BaseException, pooled: bool) -> None:
    made = Pool()
    if pooled:
        made.exchange()
    with pytest.raises(type(error)):
        made.exchange(error)
    assert [channel.closed for channel in made.opened] == [1]
    assert not made.pool._in_use
    assert not made.pool._idle
    made.exchange()
    assert len(made.opened) == 2


def test_a_connection_that_is_taken_when_the_pool_is_closed_is_closed_too() -> None:
    made = Pool()
    made.exchange()
    made.pool.close()
    with pytest.raises(ClientClosed):
        made.exchange()
    assert [channel.closed for channel in made.opened] == [1, 1]
    assert not made.pool._in_use
