"""The options of `connect`: how a client reaches its node or its cluster, checked before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Self

from attnstore.address import Address
from attnstore.directory import (
    Directory,
    DirectoryUrl,
    Member,
    MemoryDirectory,
    checked_directory,
    is_directory_url,
    open_directory,
)
from attnstore.directory.trust import MemberCheck
from attnstore.environment import variable
from attnstore.errors import InvalidArgument
from attnstore.http_client import is_http_proxy
from attnstore.limits import CHANNELS_MAX, DEADLINE_MS_MAX, NODES_MAX, REPLICAS_MAX
from attnstore.secrecy import shown
from attnstore.tokens import is_token

TransportName = Literal["auto", "grpc", "tcp", "shm"]
TRANSPORT_NAMES: Final[tuple[TransportName, ...]] = ("auto", "grpc", "tcp", "shm")


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed target URL: `grpc://host:port`, or `grpcs://host:port` for TLS."""

    address: Address
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Target:
        """Parses a target. Raises `InvalidArgument` for any other text."""
        scheme, separator, address = url.partition("://")
        if not separator:  # not even a URL: perhaps the value of a mistyped option
            raise InvalidArgument("the target is not grpc://host:port or grpcs://host:port")
        if scheme not in ("grpc", "grpcs"):
            raise InvalidArgument(f"target {shown(url)} is not grpc://host:port or grpcs://host:port")
        try:
            return cls(Address.parse(address), scheme == "grpcs")
        except InvalidArgument as error:
            raise InvalidArgument(f"target {shown(url)}: {error}") from None


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How a client reaches its node. `tls_ca`: PEM certificates of the trusted authorities, None for the system's.

    `check`: the check that the node must pass before anything is sent to it, or None. `http_proxy`: URL of the HTTP proxy for gRPC
    connections, or None.
    """

    target: Target
    deadline_ms: float
    token: str | None = field(repr=False)
    tls_ca: bytes | None = field(repr=False)
    transport: TransportName
    channels: int
    shared_path: Path | None = None
    http_proxy: str | None = field(default=None, repr=False)
    check: MemberCheck | None = None

    @classmethod
    def create(
        cls,
        target: str,
        *,
        deadline_ms: float,
        token: str | None,
        tls_ca: str | Path | None,
        transport: str,
        channels: int,
        shared_path: str | Path | None = None,
        http_proxy: str | None = None,
    ) -> ConnectOptions:
        """Creates options from a user's values; the token falls back to the environment's `ATTNSTORE_TOKEN`.

        Raises `InvalidArgument` for a bad value or a `tls_ca` file that cannot be read.
        """
        options = cls._checked(Target.parse(target), deadline_ms, token, tls_ca, transport, channels)
        return options.sharing(shared_path).through(http_proxy)

    def sharing(self, shared_path: str | Path | None) -> ConnectOptions:
        """Returns the same options with the path of the node's arena file."""
        return replace(self, shared_path=Path(shared_path) if shared_path is not None else None)

    def through(self, http_proxy: str | None) -> ConnectOptions:
        """Returns the same options with an HTTP proxy, which carries only gRPC.

        Raises `InvalidArgument` for a malformed URL, without showing it, or for a transport that bypasses the proxy.
        """
        if http_proxy is None:
            return self
        if not is_http_proxy(http_proxy):
            raise InvalidArgument("http_proxy is not http://host:port")
        if self.transport not in ("auto", "grpc"):
            raise InvalidArgument(f"transport {self.transport!r} goes past an HTTP proxy: say grpc, or leave http_proxy out")
        return replace(self, http_proxy=http_proxy, transport="grpc")

    def at(self, member: Member, check: MemberCheck | None = None) -> ConnectOptions:
        """Returns the same options for a node of a cluster, which must pass the check before anything is sent to it. Raises
        `InvalidArgument`.
        """
        return replace(self, target=Target.parse(member.url), check=check)

    @classmethod
    def of_cluster(
        cls, tls: bool, *, deadline_ms: float, token: str | None, tls_ca: str | Path | None, transport: str, channels: int
    ) -> ConnectOptions:
        """Returns options for nodes whose addresses are not known yet; `at` gives those of a node."""
        return cls._checked(Target(Address("", 0), tls), deadline_ms, token, tls_ca, transport, channels)

    @classmethod
    def _checked(
        cls, parsed: Target, deadline_ms: float, token: str | None, tls_ca: str | Path | None, transport: str, channels: int
    ) -> ConnectOptions:
        token = variable("token") if token is None else token
        if token is not None and not is_token(token):
            raise InvalidArgument("token must be printable ASCII without spaces")
        if tls_ca is not None and not parsed.tls:
            raise InvalidArgument(f"tls_ca is given, but target {str(parsed.address)!r} does not use TLS: say grpcs://")
        try:
            authorities = Path(tls_ca).read_bytes() if tls_ca is not None else None
        except OSError as error:
            raise InvalidArgument(f"tls_ca {tls_ca} cannot be read: {error.strerror}") from None
        return cls(
            parsed,
            checked_deadline_ms(deadline_ms),
            token,
            authorities,
            _checked_transport(transport),
            _checked_channels(channels),
        )


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """How a client reaches a cluster: `nodes` are the URLs of a fixed list, or `directory` is the URL of the directory with the
    list.

    `node` contains the options shared by all nodes; `replicas` applies to a fixed list.
    """

    nodes: tuple[str, ...]
    directory: str = field(repr=False)
    replicas: int
    node: ConnectOptions

    @classmethod
    def create(
        cls,
        target: str,
        *,
        deadline_ms: float,
        token: str | None,
        tls_ca: str | Path | None,
        transport: str,
        channels: int,
        shared_path: str | Path | None = None,
        http_proxy: str | None = None,
    ) -> Self:
        """As `ConnectOptions.create`, for a target for which `is_cluster` is true: a directory's URL, or
        `grpc://a:7400,b:7400?replicas=2`.
        """
        nodes: tuple[str, ...] = ()
        replicas = 1
        has_key = False
        if is_directory_url(target):
            checked_directory(target)
            has_key = DirectoryUrl.parse(target).key is not None
            tls = tls_ca is not None
        else:
            nodes, replicas = _fixed_list(target)
            tls = Target.parse(nodes[0]).tls
        node = ConnectOptions.of_cluster(
            tls, deadline_ms=deadline_ms, token=token, tls_ca=tls_ca, transport=transport, channels=channels
        )
        if node.token is not None and not nodes and not has_key:
            raise InvalidArgument(
                "a token is sent to nodes that a directory names, so the directory's URL must say by which key to know them: add "
                "key=KEY, or key=/FILE, of attnstore cluster-key"
            )
        return cls(nodes, "" if nodes else target, replicas, node.sharing(shared_path).through(http_proxy))

    def open_directory(self) -> Directory:
        """Returns the directory, for the running event loop; nothing is sent yet."""
        if self.directory:
            return open_directory(self.directory, tls_only=self.node.target.tls)
        return MemoryDirectory(
            members=[Member(url.partition("://")[2], url, weight=1.0, replicas=self.replicas) for url in self.nodes]
        )


def is_cluster(target: str) -> bool:
    """Returns whether `target` names a cluster, not one node."""
    return is_directory_url(target) or "," in target


def options_of(
    target: str,
    *,
    deadline_ms: float,
    token: str | None,
    tls_ca: str | Path | None,
    transport: str,
    channels: int,
    shared_path: str | Path | None = None,
    http_proxy: str | None = None,
) -> ConnectOptions | ClusterOptions:
    """Returns the options for `target`: those of a cluster or of one node. Raises as their `create` does."""
    create = ClusterOptions.create if is_cluster(target) else ConnectOptions.create
    return create(
        target,
        deadline_ms=deadline_ms,
        token=token,
        tls_ca=tls_ca,
        transport=transport,
        channels=channels,
        shared_path=shared_path,
        http_proxy=http_proxy,
    )


def checked_target(text: str) -> str:
    """Returns the text. Raises `InvalidArgument` unless it is a target of `connect`. Nothing is sent or read."""
    if is_directory_url(text):
        DirectoryUrl.parse(text)
    elif is_cluster(text):
        _fixed_list(text)
    else:
        Target.parse(text)
    return text


def _fixed_list(target: str) -> tuple[tuple[str, ...], int]:
    scheme, _, rest = target.partition("://")
    addresses, _, query = rest.partition("?")
    name, _, value = query.partition("=")
    if query and (name != "replicas" or not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= REPLICAS_MAX):
        raise InvalidArgument(f"target {shown(target)}: only ?replicas=N may follow the nodes, with N from 1 to {REPLICAS_MAX}")
    nodes = tuple(f"{scheme}://{address}" for address in addresses.split(","))
    for url in nodes:
        Target.parse(url)
    if len(set(nodes)) != len(nodes) or len(nodes) > NODES_MAX:
        raise InvalidArgument(f"target {shown(target)} names a node twice, or more than {NODES_MAX} nodes")
    return nodes, int(value) if query else 1


def _checked_transport(transport: str) -> TransportName:
    for name in TRANSPORT_NAMES:
        if transport == name:
            return name
    raise InvalidArgument(f"transport is {transport!r}; it must be one of {', '.join(TRANSPORT_NAMES)}")


def _checked_channels(channels: int) -> int:
    if not 1 <= channels <= CHANNELS_MAX:
        raise InvalidArgument(f"channels is {channels}; it must be between 1 and {CHANNELS_MAX}")
    return channels


def checked_deadline_ms(deadline_ms: float) -> float:
    """Returns `deadline_ms`. Raises `InvalidArgument` unless it is positive and at most `limits.DEADLINE_MS_MAX`."""
    if not 0 < deadline_ms <= DEADLINE_MS_MAX:
        raise InvalidArgument(f"deadline_ms is {deadline_ms}; it must be positive and at most {DEADLINE_MS_MAX}")
    return float(deadline_ms)
