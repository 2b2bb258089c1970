"""Addresses: which texts are parsed, which are refused, and the sockets for them."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from attnstore.address import Address
from attnstore.errors import InvalidArgument


@contextmanager
def listening(host: str) -> Iterator[int]:
    """Returns the one port on which all sockets of the host listen."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in Address.of(host, 0).listen()]
        (port,) = {listener.getsockname()[1] for listener in listeners}
        yield port


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("store_1.example.org.:7400", "store_1.example.org.", 7400),
        ("10.0.0.1:0", "10.0.0.1", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:7400", "fe80::1%eth0", 7400),
        ("[::ffff:10.0.0.1]:1", "::ffff:10.0.0.1", 1),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert str(address) == text
    assert Address.parse(text, default_port=9) == address


@pytest.mark.parametrize("text", ["", "x", "x:", ":1", "x:y", "x:65536", "x:-1", "x:１", "[::1]", "[::1]:", "[::1]1", "x:999999"])  # noqa: RUF001
def test_what_has_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="must be host:port"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["::1:7400", "::1", "fd00::1:2", "[::1:7400", "[x]:1", "[127.0.0.1]:1", "[::1%]:1", "[]:1"])
def test_an_ipv6_address_stands_in_brackets_and_nothing_else_does(text: str) -> None:
    with pytest.raises(InvalidArgument, match="brackets"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["0:1", "127.1:1", "1.2.3.4.5:1", "256.0.0.1:1", "0x7f000001:1", "010.0.0.1:1", "1.2.3.4.:1"])
def test_what_a_resolver_would_guess_to_be_ipv4_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="four decimal numbers"):
        Address.parse(text)


@pytest.mark.parametrize("host", ["a b", "a/b", "u:p@h", "a..b", "-a", "ä", "x" * 64, "x\n", "h?q", "a.b." * 70])
def test_what_is_no_name_is_refused_and_not_repeated(host: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Address.parse(f"{host}:1")
    assert host not in str(caught.value)


def test_a_default_port_makes_the_port_and_the_brackets_optional() -> None:
    assert Address.parse("store-1", 9) == Address("store-1", 9)
    assert Address.parse("::1", 9) == Address.parse("[::1]", 9) == Address("::1", 9)
    assert Address.parse("2001:db8:0:0:0:0:0:1", 9) == Address("2001:db8:0:0:0:0:0:1", 9)
    assert Address.parse("fe80::1%eth0", 9) == Address("fe80::1%eth0", 9)
    for ambiguous in ("::1:7400", "fd00::1:2"):
        with pytest.raises(InvalidArgument, match="brackets"):
            Address.parse(ambiguous, 9)


def test_a_host_that_is_given_alone_needs_no_brackets() -> None:
    assert Address.of("::1", 1) == Address.of("[::1]", 1) == Address("::1", 1)
    assert Address.of("::1:7400", 1) == Address("::1:7400", 1)
    for host, port in (("[a]", 1), ("a:1", 1), ("", 1), ("a", -1), ("a", 65536)):
        with pytest.raises(InvalidArgument):
            Address.of(host, port)


def test_loopback_and_wildcard_are_known_by_the_address() -> None:
    def named(host: str) -> Address:
        return Address.of(host, 1)

    for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST", "localhost."):
        assert named(host).is_loopback
        assert not named(host).is_wildcard
    for host in ("0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0"):
        assert named(host).is_wildcard
        assert not named(host).is_loopback
    for host in ("10.0.0.1", "fd00::1", "example.org", "127.example.org", "localhost.example.org"):
        assert not named(host).is_loopback
        assert not named(host).is_wildcard


BOTH = ("127.0.0.1", "::1")


@pytest.mark.ipv6
@pytest.mark.parametrize(
    ("host", "reached"),
    [("127.0.0.1", BOTH[:1]), ("::1", BOTH[1:]), ("localhost", BOTH), ("LocalHost.", BOTH), ("0.0.0.0", BOTH), ("::", BOTH)],
)
def test_a_listener_is_reached_on_every_address_that_its_host_stands_for(host: str, reached: tuple[str, ...]) -> None:
    with listening(host) as port:
        for other in BOTH:
            if other in reached:
                Address(other, port).connect(5).close()
            else:
                with pytest.raises(ConnectionRefusedError):
                    Address(other, port).connect(5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
def test_a_listener_of_ipv4_needs_no_ipv6(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.socket

    def without_ipv6(family: int, *arguments: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return make(family, *arguments)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with listening(host) as port:
        Address("127.0.0.1", port).connect(5).close()
        Address("localhost", port).connect(5).close()


def test_a_fixed_port_that_is_taken_for_one_address_is_taken() -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
            with pytest.raises(OSError, match="in use"):
                Address.of(host, taken).listen()


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    for host in ("203.0.113.7", "2001:db8::7"):
        with pytest.raises(OSError, match=r"assign|supported"):
            Address.of(host, 0).listen()


@pytest.mark.ipv6
def test_connecting_tries_every_address_of_the_host() -> None:
    with listening("::1") as port:
        Address("localhost", port).connect(5).close()


def test_clients_load_nothing_that_reads_options() -> None:
    code = "import sys, attnstore, attnstore.client.cluster; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
