"""The URL of a directory: which Redis or Valkey, how it is reached, and which of its clusters is meant.

    redis://HOST:PORT/DB                    one server; rediss:// with TLS
    redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB     the primary that the Sentinels name; rediss+sentinel:// with TLS
    redis+cluster://HOST:PORT,HOST:PORT     a Redis Cluster, found through any of its nodes; rediss+cluster:// with TLS

Before the hosts goes `USER:PASSWORD@` (percent-encoded) for an ACL user; after everything `?cluster=NAME` for one of several
clusters in one directory (default `default`), and `&ca=FILE` for a private certificate authority.

Invariant: what is `shown` has no password in it, and neither has any message of an error.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

from attnstore.address import Address
from attnstore.errors import InvalidArgument

SCHEMES = frozenset(f"redis{tls}{kind}" for tls in ("", "s") for kind in ("", "+sentinel", "+cluster"))
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.")
_SENTINEL_PORT = 26379
_REDIS_PORT = 6379


def is_directory_url(target: str) -> bool:
    """Whether `target` names a directory, and so a cluster."""
    return target.partition("://")[0] in SCHEMES


@dataclass(frozen=True, slots=True)
class DirectoryUrl:
    """A parsed URL. `kind` is `standalone`, `sentinel` or `cluster`; `service` is the name that the Sentinels know."""

    kind: str
    hosts: tuple[tuple[str, int], ...]
    tls: bool
    ca: str | None
    username: str | None
    password: str | None = field(repr=False)
    service: str
    database: int
    cluster: str
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises `InvalidArgument`, without the password, for anything else."""
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.scheme not in SCHEMES:
            raise InvalidArgument(f"directory {shown!r} is not redis://, redis+sentinel:// or redis+cluster://, or one with rediss")
        kind = parts.scheme.partition("+")[2] or "standalone"
        credentials, _, addresses = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        cluster, ca = query.pop("cluster", "default"), query.pop("ca", None)
        if query or parts.fragment:
            raise InvalidArgument(f"directory {shown!r}: only ?cluster=NAME and &ca=FILE may follow")
        if not cluster or set(cluster) - _NAME_CHARACTERS:
            raise InvalidArgument(f"directory {shown!r}: a cluster's name has letters, digits, '-', '_' and '.' only")
        path = [unquote(part) for part in parts.path.split("/") if part]
        service = path.pop(0) if kind == "sentinel" and path else ""
        if kind == "sentinel" and not service:
            raise InvalidArgument(f"directory {shown!r}: the name of the service that the Sentinels know must follow the hosts")
        database = path.pop(0) if kind != "cluster" and path else "0"
        if path or not (database.isascii() and database.isdigit()):
            raise InvalidArgument(f"directory {shown!r}: {'/'.join(path) or database!r} is not the number of a database")
        return cls(
            kind=kind,
            hosts=_hosts(addresses, kind, shown),
            tls=parts.scheme.startswith("rediss"),
            ca=ca,
            username=unquote(username) or None,
            password=unquote(password) or None,
            service=service,
            database=int(database),
            cluster=cluster,
            shown=shown,
        )


def _hosts(addresses: str, kind: str, shown: str) -> tuple[tuple[str, int], ...]:
    default = _SENTINEL_PORT if kind == "sentinel" else _REDIS_PORT
    try:
        hosts = tuple((each.host, each.port) for each in (Address.parse(text, default) for text in addresses.split(",")))
    except ValueError as error:
        raise InvalidArgument(f"directory {shown!r}: {error}") from None
    if kind == "standalone" and len(hosts) != 1:
        raise InvalidArgument(f"directory {shown!r}: several hosts need redis+sentinel:// or redis+cluster://")
    return hosts
