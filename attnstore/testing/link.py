"""Links to measure on: a store node seen over a network of a given rate, delay and temper, on one machine.

Owns: `Link`, a relay process that is there for a `with` block, and the command `python -m attnstore.testing.link`.
Invariant: when the `with` block ends, however it ends, the process is gone and its connections are broken.

A relay takes its targets' own ports on another address of this machine (127.0.0.2 and following). So a client that is told of the
page channel as "port P where you reach me" reaches it through the relay too, and neither node nor client knows that there is one.
Linux only. A node on the same host also offers shared memory, which no relay can slow: say `transport="tcp"` (or `grpc`), or start
the node with `--transports tcp`.

>>> with Link.to_node(store_url, "1g@2ms") as link:
...     with attnstore.connect(link.url, transport="tcp") as client:
...         _ = client.stats()
...         link.change("10m")  # in the middle of whatever runs
...         _ = client.stats()
...     link.traffic().connections
1
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import attnstore
from attnstore.address import Address
from attnstore.errors import AttnStoreError, InvalidArgument
from attnstore.links import PROFILES, LinkProfile, parse_link
from attnstore.testing.link_relay import Relay, Traffic

_START_S_MAX = 30.0
_STOP_S_MAX = 10.0
_READY = "relaying "
_TIMER_SLACK_NS = 1_000
_PR_SET_TIMERSLACK = 29
_TARGETS_PORT = -1
"""None means the target's port."""


class Link:
    """A relay process to `targets` (`host:port` each); `addresses[i]` leads to `targets[i]`. A context manager.

    `profile` is a `LinkProfile`, or text for `parse_link`. `listen_host` is where the relay listens, on the targets' ports; by
    default the first loopback address from 127.0.0.2 on where all these ports are free. The same `seed` gives the same jitter for
    the same connections in the same order. Raises `RuntimeError` with the relay's output if it does not start, `InvalidArgument`
    for a bad profile.
    """

    def __init__(
        self, targets: Sequence[str], profile: LinkProfile | str = "loopback", *, listen_host: str = "auto", seed: int = 0
    ) -> None:
        self.targets = tuple(targets)
        self.profile = _profile(profile)
        options = ["--listen", listen_host, "--profile", self.profile.spec, "--seed", str(seed), "--control"]
        for target in targets:
            options += ["--target", target]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attnstore.testing.link", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addresses = self._wait_until_ready()
        self._lock = threading.Lock()

    @classmethod
    def to_node(cls, url: str, profile: LinkProfile | str = "loopback", *, token: str | None = None, seed: int = 0) -> Link:
        """Returns a link to the store node at `url` (`grpc://host:port`): to its service and to its page channel, if it offers one.

        Connect to `link.url`. Also raises the errors of `attnstore.connect` and `describe`.
        """
        with attnstore.connect(url, transport="grpc", token=token) as client:
            offered = client.describe().transports
        service = Address.parse(url.removeprefix("grpc://"))
        targets = [service]
        if "tcp" in offered:
            targets.append(service.at(int(offered["tcp"].removeprefix(":"))))
        return cls([str(target) for target in targets], profile, seed=seed)

    @property
    def url(self) -> str:
        """The URL of the first target through the link, for `attnstore.connect`."""
        return f"grpc://{self.addresses[0]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def change(self, profile: LinkProfile | str) -> None:
        """Switches to another profile; bytes in flight arrive as before."""
        self.profile = _profile(profile)
        self._command(f"profile {self.profile.spec}")

    def stall(self) -> None:
        """Stops all traffic without breaking connections, until `restore`."""
        self._command("stall")

    def flap(self, period_ms: float) -> None:
        """Alternates between stalled and open, one period each, until `restore`."""
        self._command(f"flap {period_ms}")

    def cut(self) -> None:
        """Breaks every connection, and every new one, until `restore`."""
        self._command("cut")

    def restore(self) -> None:
        """Ends a stall, flapping or a cut."""
        self._command("restore")

    def traffic(self) -> Traffic:
        """Returns the traffic since the start."""
        return Traffic(**json.loads(self._command("traffic")))

    def close(self) -> None:
        """Ends the relay. Closing twice is harmless."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _wait_until_ready(self) -> tuple[str, ...]:
        assert self._process.stdout is not None
        killer = threading.Timer(_START_S_MAX, self._process.kill)
        killer.start()
        lines = [self._process.stdout.readline() for _ in self.targets]
        killer.cancel()
        killer.join()
        if not all(line.startswith(_READY) for line in lines):
            assert self._process.stderr is not None
            self._process.kill()
            words = self._process.stderr.read()
            self.close()
            raise RuntimeError(f"the relay did not start: {words.strip()}")
        return tuple(line.split()[1] for line in lines)

    def _command(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise RuntimeError(f"the relay refused {command!r}: {answer or 'it has ended'}")
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Relays until it is interrupted. Returns 2 after a one-line message if the options are wrong."""
    options = _parser().parse_args(argv)
    _wake_on_time()
    try:
        targets = [_address("--target", target) for target in options.target]
        profile = parse_link(options.profile)
        places = _places(options.listen, [target.port for target in targets])
    except (AttnStoreError, OSError, ValueError) as error:
        print(f"link: {error}", file=sys.stderr)
        return 2
    routes = [(listener, target) for place, target in zip(places, targets, strict=True) for listener in place.listeners]
    relay = Relay(routes, profile, options.seed)
    for place, target in zip(places, targets, strict=True):
        print(f"{_READY}{place.address} to {target} over {profile.spec}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if options.control:
            _obey(relay, sys.stdin)
        else:
            threading.Event().wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m attnstore.testing.link", description="A TCP relay that behaves like a network.")
    parser.add_argument(
        "--target", action="append", required=True, metavar="HOST:PORT", help="where connections lead; repeat it for several ports"
    )
    parser.add_argument(
        "--listen",
        default="auto",
        metavar="HOST[:PORT]",
        help="where to listen: a host, on the targets' own ports; host:port for a single target; auto (default) takes 127.0.0.2 "
        "or the next address of this machine where the ports are free",
    )
    parser.add_argument(
        "--profile", default="loopback", help=f"{', '.join(PROFILES)}, or RATE[/UP][@RTTms[~JITTERms]] [default: %(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    parser.add_argument(
        "--control",
        action="store_true",
        help="take commands from standard input and end with it: profile P, stall, flap MS, cut, restore, traffic",
    )
    return parser


@dataclass(frozen=True, slots=True)
class _Place:
    """A listening place for connections to one target, and its sockets."""

    address: Address
    listeners: tuple[socket.socket, ...]


def _places(where: str, ports: Sequence[int]) -> list[_Place]:
    if where == "auto":
        for last in range(2, 255):
            with contextlib.suppress(OSError):
                return _listen_all(f"127.0.0.{last}", ports)
        raise InvalidArgument(f"no address 127.0.0.2 to 127.0.0.254 has the ports {', '.join(map(str, ports))} free")
    address = _address("--listen", where, _TARGETS_PORT)
    if address.port == _TARGETS_PORT:
        return _listen_all(address.host, ports)
    if len(ports) > 1:
        raise InvalidArgument("--listen HOST:PORT takes a single --target; say --listen HOST to keep the targets' ports")
    return _listen_all(address.host, [address.port])


def _address(option: str, text: str, default_port: int | None = None) -> Address:
    try:
        return Address.parse(text, default_port)
    except InvalidArgument as error:
        raise InvalidArgument(f"{option} {text}: {error}") from None


def _listen_all(host: str, ports: Sequence[int]) -> list[_Place]:
    places: list[_Place] = []
    with contextlib.ExitStack() as stack:
        for port in ports:
            listeners = Address.of(host, port).listen()
            for listener in listeners:
                stack.enter_context(listener)
            places.append(_Place(Address.of(host, listeners[0].getsockname()[1]), listeners))
        stack.pop_all()
    return places


def _obey(relay: Relay, commands: Iterable[str]) -> None:
    for line in commands:
        try:
            answer = _do(relay, line.split())
        except (InvalidArgument, ValueError) as error:
            answer = f"error: {error}"
        print(answer, flush=True)


def _do(relay: Relay, words: list[str]) -> str:
    match words:
        case ["profile", text]:
            relay.change(parse_link(text))
        case ["flap", period_ms] if float(period_ms) > 0:
            relay.flap(float(period_ms) / 1000)
        case ["stall"]:
            relay.stall()
        case ["cut"]:
            relay.cut()
        case ["restore"]:
            relay.restore()
        case ["traffic"]:
            return json.dumps(asdict(relay.traffic()))
        case _:
            raise InvalidArgument("say profile P, stall, flap MS, cut, restore or traffic")
    return "ok"


def _profile(profile: LinkProfile | str) -> LinkProfile:
    return parse_link(profile) if isinstance(profile, str) else profile


def _wake_on_time() -> None:
    """The kernel may delay wake-ups by 50 us to merge interrupts, which is half of our budget."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
