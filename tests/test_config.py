"""Every option can be set in three places, with a fixed precedence, and a bad one stops the start with its name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from attnstore.address import Address
from attnstore.config import ServeOptions, add_serve_options, ignored_variables, load_serve_options
from attnstore.errors import InvalidArgument

VALUES: dict[str, tuple[str, object]] = {
    "listen": ("127.0.0.1:7001", "127.0.0.1:7001"),
    "capacity": ("3MiB", 3 << 20),
    "node_id": ("ada", "ada"),
    "directory": ("redis://ada:secret@h:1/2", "redis://ada:secret@h:1/2"),
    "advertise": ("store-1:7400", "store-1:7400"),
    "weight": ("2.5", 2.5),
    "attend_threads": ("3", 3),
    "replicas": ("2", 2),
    "hot_uses": ("7", 7),
    "transports": ("none", "none"),
    "page_channel_port": ("7002", 7002),
    "metrics_port": ("7003", 7003),
    "token": ("s3cret", "s3cret"),
    "tokens_file": ("tokens.toml", Path("tokens.toml")),
    "tls_cert": ("cert.pem", Path("cert.pem")),
    "tls_key": ("key.pem", Path("key.pem")),
    "peer_ca": ("ca.pem", Path("ca.pem")),
    "insecure": ("true", True),
    "arena_path": ("pages", Path("pages")),
    "scrub_rate": ("5MiB", 5 << 20),
    "drain_ms": ("11", 11),
    "stall_ms": ("222", 222),
    "cluster_key": ("cluster.key", Path("cluster.key")),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
}
PARTNERS = {"tls_cert": "tls_key", "tls_key": "tls_cert"}


@pytest.fixture(autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("files")
    for name in ("tokens.toml", "cert.pem", "key.pem", "ca.pem", "cluster.key"):
        (folder / name).touch()
    monkeypatch.chdir(folder)


def load(*arguments: str, environment: dict[str, str] | None = None) -> ServeOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_serve_options(parser)
    return load_serve_options(parser.parse_args(arguments), environment or {})


def shown(options: ServeOptions, name: str) -> object:
    value = getattr(options, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def needed(name: str) -> list[str]:
    return [name, PARTNERS[name]] if name in PARTNERS else [name]


def test_every_option_is_tried_here() -> None:
    fields = set(ServeOptions.model_fields)
    assert set(VALUES) <= fields
    for name in fields - set(VALUES):
        pytest.fail(f"option {name} has no example in VALUES")


@pytest.mark.parametrize("name", VALUES)
def test_each_option_is_taken_from_the_command_line(name: str) -> None:
    arguments = []
    for option in needed(name):
        arguments.append("--" + option.replace("_", "-"))
        if option != "insecure":
            arguments.append(VALUES[option][0])
    assert shown(load(*arguments), name) == VALUES[name][1]


@pytest.mark.parametrize("name", VALUES)
def test_each_option_is_taken_from_the_environment(name: str) -> None:
    environment = {f"ATTNSTORE_{option.upper()}": VALUES[option][0] for option in needed(name)}
    assert shown(load(environment=environment), name) == VALUES[name][1]


@pytest.mark.parametrize("name", [*VALUES, "config"])
def test_an_empty_variable_sets_nothing(name: str) -> None:
    assert load(environment={f"ATTNSTORE_{name.upper()}": ""}) == load()


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"insecure"}))
def test_an_option_that_is_given_empty_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    option = "--" + name.replace("_", "-")
    path = tmp_path / "node.toml"
    path.write_text(f'{name} = ""')
    for arguments, place in (((f"{option}=",), "command line"), (("--config", str(path)), f"file {path}")):
        with pytest.raises(InvalidArgument, match=rf"{option} \({re.escape(place)}\) is empty"):
            load(*arguments)


SERVICE_LINKS = {
    "ATTNSTORE_{}_PORT": "tcp://10.0.0.1:9400",
    "ATTNSTORE_{}_SERVICE_HOST": "10.0.0.1",
    "ATTNSTORE_{}_SERVICE_PORT": "9400",
    "ATTNSTORE_{}_SERVICE_PORT_GRPC": "9400",
    "ATTNSTORE_{}_PORT_9400_TCP": "tcp://10.0.0.1:9400",
    "ATTNSTORE_{}_PORT_9400_TCP_ADDR": "10.0.0.1",
    "ATTNSTORE_{}_PORT_9400_TCP_PORT": "9400",
    "ATTNSTORE_{}_PORT_9400_TCP_PROTO": "tcp",
}
"""The variables that Kubernetes sets for the pods of a namespace with a Service `attnstore-X`."""


@pytest.mark.parametrize("service", ["METRICS", "PAGE_CHANNEL", "NODE", "LISTEN", "TLS"])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_what_kubernetes_says_of_a_service_is_no_option(service: str, protocol: str) -> None:
    environment = {
        name.format(service).replace("TCP", protocol.upper()): value.replace("tcp", protocol)
        for name, value in SERVICE_LINKS.items()
    }
    assert load(environment=environment) == load()
    clashes = {"METRICS": {"ATTNSTORE_METRICS_PORT"}, "PAGE_CHANNEL": {"ATTNSTORE_PAGE_CHANNEL_PORT"}}
    assert set(ignored_variables(environment)) == clashes.get(service, set())


@pytest.mark.parametrize("name", VALUES)
def test_no_option_has_a_name_that_a_service_link_takes_with_a_plain_value(name: str) -> None:
    assert not re.search(r"SERVICE_(HOST|PORT)|PORT_\d", name.upper()), "Kubernetes could set it, and nobody could tell"


def test_a_port_that_somebody_meant_is_one() -> None:
    environment = {"ATTNSTORE_METRICS_PORT": "9400"}
    assert load(environment=environment).metrics_port == 9400
    assert not ignored_variables(environment)


@pytest.mark.parametrize("dashes", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_each_option_is_taken_from_a_file(tmp_path: Path, name: str, dashes: bool) -> None:
    path = tmp_path / "node.toml"
    lines = [f'{option.replace("_", "-") if dashes else option} = "{VALUES[option][0]}"' for option in needed(name)]
    path.write_text("\n".join(lines))
    assert shown(load("--config", str(path)), name) == VALUES[name][1]
    assert shown(load(environment={"ATTNSTORE_CONFIG": str(path)}), name) == VALUES[name][1]


def test_native_types_of_a_file_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("capacity = 8388608\ninsecure = true\nmetrics_port = 9000\n")
    options = load("--config", str(path))
    assert (options.capacity, options.insecure, options.metrics_port) == (8 << 20, True, 9000)


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('node_id = "file"\nlog_level = "error"\ncapacity = "4MiB"\n')
    environment = {"ATTNSTORE_NODE_ID": "environment", "ATTNSTORE_LOG_LEVEL": "warning"}
    options = load("--config", str(path), "--node-id", "line", environment=environment)
    assert (options.node_id, options.log_level, options.capacity) == ("line", "warning", 4 << 20)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("listen", "7400", "host:port"),
        ("listen", "127.0.0.1:70000", "65535"),
        ("listen", ":7400", "host:port"),
        ("listen", "::1:7400", "brackets"),
        ("listen", "127.1:7400", "four decimal numbers"),
        ("listen", "a b:7400", "a name of letters"),
        ("advertise", "::1:7400", "brackets"),
        ("advertise", "store 1", "a name of letters"),
        ("advertise", "store-1:x", "host:port"),
        ("node_id", "a\u200bb", "printable"),
        ("capacity", "much", "is not a size"),
        ("capacity", "1KiB", "4.0KiB"),
        ("capacity", "-1", "is not a size"),
        ("capacity", "1EiB", "TiB"),
        ("transports", "tcp,pigeon", "transports are shm, tcp, or none"),
        ("page_channel_port", "-1", "0"),
        ("metrics_port", "65536", "65535"),
        ("metrics_port", "nine", "whole number"),
        ("insecure", "perhaps", "boolean"),
        ("drain_ms", "-1", "0"),
        ("stall_ms", "1", "100"),
        ("log_level", "loud", "debug"),
        ("log_format", "xml", "json"),
    ],
)
def test_a_bad_value_is_named_with_its_place_and_its_rule(tmp_path: Path, name: str, value: str, rule: str) -> None:
    option = "--" + name.replace("_", "-")
    path = tmp_path / "node.toml"
    path.write_text(f'{name} = "{value}"')
    attempts = [
        ((), {f"ATTNSTORE_{name.upper()}": value}, "environment"),
        (("--config", str(path)), {}, f"file {path}"),
    ]
    if name != "insecure":
        attempts.append(((f"{option}={value}",), {}, "command line"))
    for arguments, environment, place in attempts:
        with pytest.raises(InvalidArgument) as caught:
            load(*arguments, environment=environment)
        message = str(caught.value)
        assert message.startswith(option), message
        assert f"({place})" in message
        assert rule in message


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidArgument, match=r"--drain-ms.*; --stall-ms|--stall-ms.*; --drain-ms"):
        load("--drain-ms", "-1", "--stall-ms", "1")


def test_a_token_is_never_shown() -> None:
    with pytest.raises(InvalidArgument) as caught:
        load("--token", "s3cret with spaces")
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(load("--token", "s3cret"))


@pytest.mark.parametrize(
    ("content", "message"),
    [('lissten = "x"', "lissten"), ("[node]\ncapacity = 1", "node"), ("capacity", "TOML"), ("capacity = [1]", "--capacity")],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=message):
        load("--config", str(path))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"--config: 'absent\.toml' cannot be read"):
        load("--config", "absent.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tls-cert", "cert.pem"), "go together"),
        (("--tls-key", "key.pem"), "go together"),
        (("--token", "x", "--tokens-file", "tokens.toml"), "exclude each other"),
        (("--listen", "0.0.0.0:1"), "--insecure"),
        (("--listen", "store.example.org:1"), "--insecure"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        load(*arguments)


def test_tls_offers_no_transport_in_the_clear() -> None:
    assert load().bulk_transports() == {"tcp", "shm"}
    assert load("--tls-cert", "cert.pem", "--tls-key", "key.pem").bulk_transports() == set()
    assert load("--transports", "none").bulk_transports() == set()


def test_tokens_name_tenants(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text('ada = "a"\nbob = "b"\n')
    assert load("--tokens-file", str(path)).tenants() == {"a": "ada", "b": "bob"}
    assert load("--token", "t").tenants() == {"t": "default"}
    assert load().tenants() == {}
    with pytest.raises(InvalidArgument, match="--tokens-file"):
        load("--tokens-file", str(tmp_path / "absent.toml")).tenants()


@pytest.mark.parametrize(
    ("listen", "advertise", "advertised"),
    [
        ("10.0.0.1:7400", "", "10.0.0.1:7400"),
        ("0.0.0.0:7400", "store-1", "store-1:7400"),
        ("0.0.0.0:7400", "store-1:9000", "store-1:9000"),
        ("0.0.0.0:7400", "[fd00::1]:9000", "[fd00::1]:9000"),
        ("0.0.0.0:7400", "store-1:0", "store-1:7400"),
        ("[::]:7400", "::1", "[::1]:7400"),
        ("[::]:7400", "[fd00::1]", "[fd00::1]:7400"),
        ("[::1]:7400", "", "[::1]:7400"),
    ],
)
def test_a_node_advertises_what_it_is_told_and_else_where_it_listens(listen: str, advertise: str, advertised: str) -> None:
    told = ("--advertise", advertise) if advertise else ()
    options = load("--listen", listen, *told, "--insecure", "--directory", "redis://h/0")
    assert str(options.advertised(Address.parse(listen))) == advertised


def test_a_node_of_a_cluster_that_listens_everywhere_must_say_where_it_is_reached() -> None:
    for listen in ("0.0.0.0:7400", "[::]:7400", "[::0]:7400", "[::ffff:0.0.0.0]:7400"):
        options = load("--listen", listen, "--insecure", "--directory", "redis://h/0")
        with pytest.raises(InvalidArgument, match="give --advertise"):
            options.advertised(options.address)
