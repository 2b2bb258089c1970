"""Addresses of peers and listeners: `host:port`, `[ipv6]:port`.

Owns: parsing and formatting of addresses, and the sockets for them. Exists so that options, transports and the directory agree.
Invariants: `Address.parse(str(address)) == address`; the resolver determines the family of a socket, never the form of the text; no
message repeats the text, because it may be part of a URL that contains a secret.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from attnstore.errors import InvalidArgument

NODE_ADDRESS_DEFAULT: Final = "127.0.0.1:7400"
"""Where a node listens, and a client looks for one, unless told otherwise."""
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}\.?\Z){_LABEL}(?:\.{_LABEL})*\.?")
_ZONE: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_LOOPBACK: Final = ("127.0.0.1", "::1")
_NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""Errors of `bind`: this machine does not have the address, or not its family."""
_FREE_PORT_TRIES: Final = 16

_Place = tuple[socket.AddressFamily, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Address:
    """A host, without brackets, and a port. An IPv6 host may have a zone (`fe80::1%eth0`)."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Self:
        """Parses `host:port` or `[ipv6]:port`. With a default port, the port may be missing, and then also the brackets.

        Raises `InvalidArgument` for any other text, especially for an IPv6 address whose last group might be meant as a port.
        """
        if text.startswith("["):
            host, bracket, rest = text.removeprefix("[").partition("]")
            if not bracket or not _is_ipv6(host):
                raise InvalidArgument("what stands in brackets must be an IPv6 address")
        elif text.count(":") > 1:
            host, rest = text, ""
            if default_port is None or not _is_ipv6(text) or _may_end_in_port(text):
                raise InvalidArgument("an IPv6 address needs brackets, as in [::1]:7400")
        else:
            host, colon, port = text.partition(":")
            rest = colon + port
        if not rest and default_port is not None:
            return cls(_checked_host(host), default_port)
        port = rest.removeprefix(":")
        if not rest.startswith(":") or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
            raise InvalidArgument("must be host:port with a port of 0 to 65535")
        return cls(_checked_host(host), int(port))

    @classmethod
    def of(cls, host: str, port: int) -> Self:
        """Returns the address of a host given without a port, an IPv6 host with or without brackets. Raises `InvalidArgument`."""
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if bare != host and not _is_ipv6(bare):
            raise InvalidArgument("what stands in brackets must be an IPv6 address")
        if not 0 <= port <= 65535:
            raise InvalidArgument("a port is 0 to 65535")
        return cls(_checked_host(bare), port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def at(self, port: int) -> Self:
        """Returns another port of the same host."""
        return replace(self, port=port)

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the host. Of all names, only `localhost` is a loopback name (RFC 6761)."""
        number = self._number
        return self._is_localhost if number is None else number.is_loopback

    @property
    def is_wildcard(self) -> bool:
        """True if the host means all addresses of a machine."""
        number = self._number
        return number is not None and number.is_unspecified

    def listen(self, backlog: int = socket.SOMAXCONN) -> tuple[socket.socket, ...]:
        """Returns listening sockets, all on one port, for every address of this machine that the host means; port 0 takes a free
        one.

        A wildcard of either family means all addresses of both, as in gRPC. Raises `OSError`.
        """
        for left in reversed(range(_FREE_PORT_TRIES)):
            try:
                return self._listen(backlog)
            except OSError as error:
                # The port that was free for the first address was in use for another one.
                if self.port or not left or error.errno != errno.EADDRINUSE:
                    raise
        raise AssertionError("unreachable")

    def connect(self, timeout_s: float, *, receive_buffer_bytes: int | None = None) -> socket.socket:
        """Returns a connected socket. Tries every address of the host in turn, all within `timeout_s`. Raises `OSError`."""
        until_s = time.monotonic() + timeout_s
        failure: OSError | None = None
        for family, place in self._places():
            try:
                return _connection(family, place, max(1e-3, until_s - time.monotonic()), receive_buffer_bytes)
            except OSError as error:
                failure = error
        raise failure or OSError(errno.EADDRNOTAVAIL, "the host has no address")

    @property
    def _number(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        try:
            number = ipaddress.ip_address(self.host)
        except ValueError:
            return None
        return (number.ipv4_mapped or number) if isinstance(number, ipaddress.IPv6Address) else number

    @property
    def _is_localhost(self) -> bool:
        return self.host.lower().removesuffix(".") == "localhost"

    def _places(self) -> list[_Place]:
        # `localhost` means both loopback addresses, whether or not the machine's hosts file names both (RFC 6761).
        hosts = _LOOPBACK if self._is_localhost else (self.host,)
        found = [entry for host in hosts for entry in socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)]
        return list(dict.fromkeys((family, place) for family, _, _, _, place in found))

    def _listen(self, backlog: int) -> tuple[socket.socket, ...]:
        if self.is_wildcard:
            try:
                return (_listener(socket.AF_INET6, ("::", self.port), backlog, dual_stack=True),)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                return (_listener(socket.AF_INET, ("0.0.0.0", self.port), backlog),)
        listeners: list[socket.socket] = []
        absent: OSError | None = None
        with ExitStack() as made:
            for family, (host, port, *scope) in self._places():
                port = listeners[0].getsockname()[1] if listeners else port
                try:
                    listeners.append(made.enter_context(_listener(family, (host, port, *scope), backlog)))
                except OSError as error:
                    if error.errno not in _NOT_HERE:
                        raise
                    absent = error
            if not listeners:
                raise absent or OSError(errno.EADDRNOTAVAIL, "the host has no address")
            made.pop_all()
        return tuple(listeners)


def _connection(
    family: socket.AddressFamily, place: tuple[Any, ...], timeout_s: float, receive_buffer_bytes: int | None
) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        if receive_buffer_bytes is not None:  # before connecting, because the handshake negotiates the window
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(timeout_s)
        connection.connect(place)
        connection.settimeout(None)
    except OSError:
        connection.close()
        raise
    return connection


def _listener(family: socket.AddressFamily, place: tuple[Any, ...], backlog: int, *, dual_stack: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        listener.bind(place)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _checked_host(host: str) -> str:
    if _is_ipv6(host):
        return host
    if not _NAME.fullmatch(host):
        raise InvalidArgument("must be host:port, where host is an IP address or a name of letters, digits, '-', '_' and '.'")
    # A host that ends in a number is an IPv4 address or invalid, because resolvers also read `0` and `127.1` as addresses.
    if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise InvalidArgument("must be host:port, where an IPv4 address has four decimal numbers") from None
    return host


def _is_ipv6(text: str) -> bool:
    number, percent, zone = text.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        return False
    try:
        ipaddress.IPv6Address(number)
    except ValueError:
        return False
    return True


def _may_end_in_port(text: str) -> bool:
    head, _, tail = text.rpartition(":")
    return tail.isdigit() and _is_ipv6(head)
