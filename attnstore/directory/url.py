"""The URL of a directory: the Redis or Valkey server, how to reach it, and the name of the cluster.

    redis://HOST:PORT/DB                    one server; rediss:// with TLS
    redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB     the primary that the Sentinels name; rediss+sentinel:// with TLS
    redis+cluster://HOST:PORT,HOST:PORT     a Redis Cluster, found through any of its nodes; rediss+cluster:// with TLS

`USER:PASSWORD@` before the hosts names an ACL user. `?NAME=VALUE` may follow, several separated by `&`:

    cluster             one of several clusters in one directory; default `default`
    ca                  file of a private certificate authority
    key                 public key of the cluster, or `/FILE` that contains it: records not signed with it are not believed
    sentinel_username   of the Sentinels, which have users of their own, or none
    sentinel_password

Special characters in names and passwords are percent-encoded: `%40` for `@`, `%2F` for `/`, `%23` for `#`.

Invariant: `shown` consists of parsed parts without logins; an error about a URL that cannot be parsed shows only its scheme.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from attnstore.address import Address
from attnstore.errors import InvalidArgument

SCHEMES = frozenset(f"redis{tls}{kind}" for tls in ("", "s") for kind in ("", "+sentinel", "+cluster"))
_URL = re.compile(r"[a-z+]+://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL)
_NAME = re.compile(rf"[{re.escape(string.ascii_letters + string.digits)}._-]+")
_SENTINEL_PORT = 26379
_REDIS_PORT = 6379


def is_directory_url(target: str) -> bool:
    """Returns whether `target` is the URL of a directory, and therefore means a cluster."""
    return target.partition("://")[0] in SCHEMES


@dataclass(frozen=True, slots=True)
class DirectoryUrl:
    """A parsed URL. `kind` is `standalone`, `sentinel` or `cluster`; `service` is the name that the Sentinels know."""

    kind: str
    hosts: tuple[tuple[str, int], ...]
    tls: bool
    ca: str | None
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    sentinel_username: str | None = field(repr=False)
    sentinel_password: str | None = field(repr=False)
    service: str
    database: int
    cluster: str
    key: str | None
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parses a URL. Raises `InvalidArgument`, whose message shows only the scheme, for any other text."""
        scheme = url.partition("://")[0]
        parts = _URL.fullmatch(url)
        if scheme not in SCHEMES or parts is None:
            raise InvalidArgument("the directory's URL is not redis://, redis+sentinel:// or redis+cluster://, or one with rediss")
        kind, tls = scheme.partition("+")[2] or "standalone", scheme.startswith("rediss")
        credentials, _, addresses = parts["authority"].rpartition("@")
        if "@" in parts["path"] + (parts["query"] or "") + (parts["fragment"] or ""):
            raise _refusal(scheme, "an '@' follows the hosts: percent-encode what is special in a password (%40, %2F, %3F, %23)")
        if parts["fragment"] is not None:
            raise _refusal(scheme, "a '#' is in it: percent-encode it as %23")
        hosts = _hosts(scheme, addresses, _SENTINEL_PORT if kind == "sentinel" else _REDIS_PORT)
        if kind == "standalone" and len(hosts) != 1:
            raise _refusal(scheme, "several hosts need redis+sentinel:// or redis+cluster://")
        options = _options(scheme, kind, tls, parts["query"])
        service, database = _path(scheme, kind, parts["path"])
        username, _, password = credentials.partition(":")
        path = {"standalone": f"/{database}", "sentinel": f"/{service}/{database}", "cluster": ""}[kind]
        return cls(
            kind=kind,
            hosts=tuple((host.host, host.port) for host in hosts),
            tls=tls,
            ca=options.get("ca"),
            username=unquote(username) or None,
            password=unquote(password) or None,
            sentinel_username=options.get("sentinel_username"),
            sentinel_password=options.get("sentinel_password"),
            service=service,
            database=database,
            cluster=options.get("cluster", "default"),
            key=options.get("key"),
            shown=f"{scheme}://{','.join(map(str, hosts))}{path}",
        )

    def without_secrets(self, text: str) -> str:
        """Removes the passwords from a text of unknown origin, such as a server's error."""
        for secret in (self.password, self.sentinel_password):
            if secret:
                text = text.replace(secret, "(password)")
        return text


def _refusal(scheme: str, rule: str) -> InvalidArgument:
    return InvalidArgument(f"the directory's URL {scheme}://... cannot be used: {rule}")


def _hosts(scheme: str, addresses: str, port_default: int) -> tuple[Address, ...]:
    try:
        return tuple(Address.parse(text, port_default) for text in addresses.split(","))
    except InvalidArgument as error:
        raise _refusal(scheme, f"{error} (each of the hosts)") from None


def _options(scheme: str, kind: str, tls: bool, query: str | None) -> dict[str, str]:
    known = ("cluster", "ca", "key", *(("sentinel_username", "sentinel_password") if kind == "sentinel" else ()))
    options: dict[str, str] = {}
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name not in known or name in options or not value:
            raise _refusal(scheme, f"after the '?' may follow NAME=VALUE, once each, with the names {', '.join(known)}")
        options[name] = unquote(value)
    if not _NAME.fullmatch(options.get("cluster", "default")):
        raise _refusal(scheme, "a cluster's name has letters, digits, '-', '_' and '.' only")
    if "ca" in options and not tls:
        raise _refusal(scheme, "ca=FILE is for rediss://")
    return options


def _path(scheme: str, kind: str, path: str) -> tuple[str, int]:
    """Returns the service that the Sentinels know, and the number of the database."""
    parts = [unquote(part) for part in path.split("/") if part]
    service = parts.pop(0) if kind == "sentinel" and parts else ""
    if kind == "sentinel" and not _NAME.fullmatch(service):
        raise _refusal(scheme, "the name of the service that the Sentinels know must follow the hosts (letters, digits, '-_.')")
    database = parts.pop(0) if kind != "cluster" and parts else "0"
    if parts or re.fullmatch(r"[0-9]{1,9}", database) is None:
        raise _refusal(scheme, "after the hosts may follow the number of a database only, and none for redis+cluster://")
    return service, int(database)
