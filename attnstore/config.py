"""The options of a store node, which can be set in four places.

Owns: `ServeOptions` and the order command line > environment (`ATTNSTORE_*`) > TOML file (`--config`) > default.
Invariant: a bad value stops the start with one line that names the option, where it was set and the rule that it breaks.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from attnstore.address import NODE_ADDRESS_DEFAULT, Address
from attnstore.directory import DirectoryUrl
from attnstore.environment import service_links, variable, variable_name
from attnstore.errors import InvalidArgument
from attnstore.limits import (
    CAPACITY_BYTES_MAX,
    DRAIN_MS_DEFAULT,
    GIB,
    HOT_USES_DEFAULT,
    HOT_USES_MAX,
    KIB,
    NODE_ID_CHARS_MAX,
    NODE_WEIGHT_MAX,
    REPLICAS_MAX,
    SCRUB_BYTES_PER_S_DEFAULT,
    SCRUB_BYTES_PER_S_MAX,
    SETTINGS_CHARS_MAX,
    THREADS_MAX,
)
from attnstore.option_types import (
    PORT,
    InvalidValue,
    Name,
    Number,
    Parsed,
    Size,
    Whole,
    bearer_token,
    file_to_read,
    file_to_write,
    read_text,
)
from attnstore.secrecy import shown
from attnstore.sizes import size_text
from attnstore.tokens import is_token

BULK_TRANSPORTS = frozenset({"shm", "tcp"})


def _transports(text: str) -> str:
    unknown = set(text.split(",")) - BULK_TRANSPORTS if text != "none" else set()
    if unknown:
        raise InvalidArgument(f"{shown(text)}: transports are {', '.join(sorted(BULK_TRANSPORTS))}, or none")
    return text


def _listening(text: str) -> str:
    Address.parse(text)
    return text


def _advertised(text: str) -> str:
    Address.parse(text, 0)
    return text


def _directory(text: str) -> str:
    DirectoryUrl.parse(text)
    return text


_File = Annotated[Path, BeforeValidator(file_to_read)]
_Port = Annotated[int, BeforeValidator(PORT)]


class ServeOptions(BaseModel):
    """All options of `attnstore serve`. Field names are the long options with `-` replaced by `_`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: Annotated[str, BeforeValidator(Parsed(_listening))] = Field(
        NODE_ADDRESS_DEFAULT, description="host:port or [ipv6]:port of the gRPC service; port 0 takes a free one"
    )
    capacity: Annotated[int, BeforeValidator(Size(4 * KIB, CAPACITY_BYTES_MAX))] = Field(
        2 * GIB, description="bytes of pages that the node holds at most, for example 2GiB"
    )
    arena_path: Annotated[Path, BeforeValidator(file_to_write)] | None = Field(
        None, description="file or memory device for the pages, for example /dev/dax0.0; default: the node's own memory"
    )
    node_id: Annotated[str, BeforeValidator(Name(NODE_ID_CHARS_MAX))] = Field(
        "", description="name of the node in logs, metrics and the directory; default: the address that it advertises"
    )
    directory: Annotated[SecretStr, BeforeValidator(Parsed(_directory))] | None = Field(
        None, description="URL of the cluster's directory, for example redis://HOST:6379/0; none: a standalone node"
    )
    cluster_key: _File | None = Field(
        None,
        description="file of the cluster's key, made by attnstore cluster-key; required if the nodes of a cluster ask for tokens",
    )
    advertise: Annotated[str, BeforeValidator(Parsed(_advertised))] = Field(
        "", description="host:port, or host, where others reach the node; default: the address it listens on"
    )
    weight: Annotated[float, BeforeValidator(Number(0, NODE_WEIGHT_MAX, above=True))] | None = Field(
        None, description="the node's share of the cluster, relative to other nodes; default: its capacity in GiB"
    )
    replicas: Annotated[int, BeforeValidator(Whole(1, REPLICAS_MAX))] = Field(
        1, description="copies of each page in the cluster; the largest value of any node counts"
    )
    hot_uses: Annotated[int, BeforeValidator(Whole(0, HOT_USES_MAX))] = Field(
        HOT_USES_DEFAULT,
        description="leased look-ups of a segment (64 blocks) within ten seconds after which the cluster replicates it; 0: never",
    )
    transports: Annotated[str, BeforeValidator(Parsed(_transports))] = Field(
        "tcp,shm", description="bulk transports offered beside grpc, comma-separated: tcp, shm, or none"
    )
    attend_threads: Annotated[int, BeforeValidator(Whole(0, THREADS_MAX))] | None = Field(
        None, description="cores for attend queries (with attnstore[attention]); 0: no queries, and a faster start; default: all"
    )
    page_channel_port: _Port = Field(0, description="port of the page channel (tcp); 0 takes a free one")
    metrics_port: _Port | None = Field(None, description="port of the Prometheus metrics; none by default")
    token: Annotated[SecretStr, BeforeValidator(bearer_token)] | None = Field(
        None, description="token that callers must present; all callers are the tenant 'default'"
    )
    tokens_file: _File | None = Field(None, description='TOML file of `tenant = "token"` lines, for several tenants')
    tls_cert: _File | None = Field(None, description="PEM certificate chain; enables TLS together with --tls-key")
    tls_key: _File | None = Field(None, description="PEM private key of --tls-cert")
    peer_ca: _File | None = Field(
        None,
        description="PEM certificates of the authorities of other nodes, used when pages are handed over; default: the system's",
    )
    insecure: bool = Field(False, description="accept callers without a token on a public address")
    scrub_rate: Annotated[int, BeforeValidator(Size(0, SCRUB_BYTES_PER_S_MAX))] = Field(
        SCRUB_BYTES_PER_S_DEFAULT,
        description="bytes of idle pages per second that the scrubber checks for corruption; 0: none",
    )
    drain_ms: Annotated[int, BeforeValidator(Whole(0, 600_000))] = Field(
        DRAIN_MS_DEFAULT, description="time that running calls have to finish after SIGTERM"
    )
    stall_ms: Annotated[int, BeforeValidator(Whole(100, 600_000))] = Field(
        30_000, description="a call ends if its peer moves less than 8 KiB/s for this time"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level of log lines shown")
    log_format: Literal["console", "json"] = Field("console", description="log lines for people or for machines")

    @model_validator(mode="after")
    def _is_safe_to_expose(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together; one of them is missing")
        if self.token is not None and self.tokens_file is not None:
            raise ValueError("--token and --tokens-file exclude each other")
        asks_for_token = self.token is not None or self.tokens_file is not None  # TLS alone does not restrict who may call
        if self.directory is not None and self.cluster_key is None and asks_for_token:
            raise ValueError(
                "--directory with tokens needs --cluster-key: without it nodes would believe any record in the directory, and hand "
                "tenants' pages to whoever wrote it. Make one key for all nodes with attnstore cluster-key"
            )
        if not (asks_for_token or self.insecure or self.address.is_loopback):
            raise ValueError(
                f"--listen {self.listen} is reachable from other machines: give --token or --tokens-file, "
                "or say --insecure to serve everyone who can reach it"
            )
        return self

    @property
    def address(self) -> Address:
        """The address on which the node listens; port 0 means a free one."""
        return Address.parse(self.listen)

    @property
    def share(self) -> float:
        """The node's weight in its cluster: the option, or by default its capacity."""
        return self.capacity / GIB if self.weight is None else self.weight

    def advertised(self, bound: Address) -> Address:
        """Returns the address at which others reach a node that is bound to `bound`.

        Raises `InvalidArgument` if the node of a cluster listens on all addresses and `advertise` is missing.
        """
        if self.advertise:
            advertised = Address.parse(self.advertise, bound.port)
            return advertised if advertised.port else advertised.at(bound.port)
        if self.directory is not None and bound.is_wildcard:
            raise InvalidArgument(f"--listen {self.listen} names no address that others could reach: give --advertise")
        return bound

    def bulk_transports(self) -> frozenset[str]:
        """The names of the bulk transports to offer. None of them is encrypted, so there are none with TLS."""
        if self.transports == "none" or self.tls_cert is not None:
            return frozenset()
        return frozenset(self.transports.split(","))

    def tenants(self) -> dict[str, str]:
        """Returns token -> tenant; empty if no token is required. Raises `InvalidArgument` for an unreadable or malformed file."""
        if self.token is not None:
            return {self.token.get_secret_value(): "default"}
        if self.tokens_file is None:
            return {}
        return read_tokens_file(self.tokens_file)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Adds one command line option for each field of `ServeOptions`, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of options, one `name = value` a line")
    for name, field in ServeOptions.model_fields.items():
        option = _option(name)
        help_text = f"{field.description} [env {variable_name(name)}; default: {_shown(field)}]"
        if field.annotation is bool:
            parser.add_argument(option, action="store_true", default=None, help=help_text)
        else:
            parser.add_argument(option, metavar=name.upper(), default=None, help=help_text)


def load_serve_options(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServeOptions:
    """Merges command line, environment and TOML file. Raises `InvalidArgument` naming the option and where it was set.

    An empty variable is ignored; an empty value in any other place is refused.
    """
    config_file = arguments.config or variable("config", environment)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if config_file:
        layers.append((f"file {config_file}", _read_toml(config_file, "--config")))
    fields = ServeOptions.model_fields
    given = {name: variable(name, environment) for name in fields}
    layers.append(("environment", {name: value for name, value in given.items() if value is not None}))
    given = {name: getattr(arguments, name) for name in fields}
    layers.append(("command line", {name: value for name, value in given.items() if value is not None}))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, layer in layers:
        for name, value in layer.items():
            field_name = name.replace("-", "_")
            if value == "":
                raise InvalidArgument(f"{_option(field_name)} ({where}) is empty: leave it out, or give it a value")
            values[field_name] = value
            origin[field_name] = where
    try:
        return ServeOptions(**values)
    except ValidationError as error:
        raise InvalidArgument("; ".join(_explain(problem, origin) for problem in error.errors())) from None


def ignored_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables named like options that Kubernetes has set for a Service, which are not meant as options."""
    return service_links(ServeOptions.model_fields, environment)


def _explain(problem: Any, origin: Mapping[str, str]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    where = origin.get(name, "default")
    if problem["type"] == "extra_forbidden":
        return f"{shown(name)} ({where}) is not an option of attnstore serve"
    is_told = isinstance(problem.get("ctx", {}).get("error"), InvalidValue)
    return f"{_option(name)}{'' if is_told else ' ' + shown(str(problem['input']))} ({where}): {message}"


def read_tokens_file(path: Path) -> dict[str, str]:
    """Reads token -> tenant from a file of `tenant = "token"` lines. Raises `InvalidArgument` for an unreadable or
    malformed file.
    """
    entries = _read_toml(path, "--tokens-file")
    if not entries or not all(isinstance(token, str) and is_token(token) for token in entries.values()):
        raise InvalidArgument(f'--tokens-file {path}: every line must be tenant = "token", printable ASCII without spaces')
    tenants = {token: tenant for tenant, token in entries.items()}
    if len(tenants) != len(entries):
        raise InvalidArgument(f"--tokens-file {path}: two tenants have the same token")
    return tenants


def _read_toml(path: str | Path, option: str) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file_to_read(path), SETTINGS_CHARS_MAX))
    except InvalidValue as error:
        raise InvalidArgument(f"{option}: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{option} {path} is not valid TOML: {error}") from None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(field: FieldInfo) -> str:
    if any(isinstance(each, BeforeValidator) and isinstance(each.func, Size) for each in field.metadata):
        return size_text(field.default)
    return "none" if field.default in (None, "") else str(field.default)
