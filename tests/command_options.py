"""Every option of both commands, read from their parsers, with valid, invalid and nonsense values for each kind of option.

Owns: `options`, `World` and `outcome`. A new option is found automatically; an option of a new kind fails here until it has values.
Commands are only parsed, not executed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from attnstore import cli, option_types
from attnstore.client.options import checked_target
from attnstore.command_line import run_command
from attnstore.config import ServeOptions, load_serve_options
from attnstore.option_types import Name, Number, Parsed, Size, SizeOrShare, Whole
from attnstore_worker import arguments as worker_arguments
from attnstore_worker.options import device_name

Kind = Any
"""The kind of an option's parser: one of `attnstore.option_types`, a tuple of choices, or bool."""

PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "attnstore": cli.create_parser,
    "attnstore-worker": worker_arguments.create_parser,
}

NONSENSE = (
    *("", " ", "\t", "\n", "-", "--", "=", "+", "/", ".", "..", "'", '"', "%s", "{}", "[red]", "a b", "a\nb", "a\0b", "\x1b[2J"),
    *("-1", "-5", "0", "-0", "+1", "1.5", ".5", "1.", "1_000", "0x10", "1e3", "1e400", "1e-400", "nan", "NaN", "inf", "-inf"),
    *(
        "\u0663",
        "\uff11\uff12",
        "½",
        "²",
        "\u202e1",
        "\ud800",
        "\udcff",
        "🦆",
        "9" * 19,
        "9" * 20,
        "9" * 5_000,
        "x" * 300,
        "x" * 100_000,
    ),
    *("1e", "1MiBB", "1 MiB", "1EiB", "99999EiB", "-1MiB", "true", "None", "null", "[]"),
    *("/nowhere/file", "/dev/null/file", "/dev/null", "/dev/full", "/proc/self/mem", "/" + "x/" * 3_000, "file:///etc/passwd"),
    *(":", ":1", "h:", "h:0", "h:99999", "[::1", "::1:7400", "grpc://", "grpc://h", "grpc://h:1,", "grpc://h:1?replicas=\u0663"),
    *("grpc://h:1,i:2?replicas=" + "9" * 5_000, "http://", "http://[", "http://h:x", "http://h:1\n", "redis://h:x/0", "redis://[/"),
    *("redis://:pass@word@h:1/0", "0xh100", "9" * 5_000 + "xh100", "1g@", "inf@infms", "1g@1ms~9ms", "k", "1kk"),
)
"""Accepted or refused, but never with a traceback."""


@dataclass(frozen=True)
class Option:
    """`flag` is the text on the command line, or the metavar of a positional argument; `variable` sets it in the environment."""

    program: str
    command: str
    flag: str
    kind: Kind
    variable: str | None
    required: bool

    @property
    def positional(self) -> bool:
        return not self.flag.startswith("--")

    def __str__(self) -> str:
        return f"{self.program} {self.command} {self.flag}"


def _values(table: dict[Kind, list[str]], option: Option, kind: Kind) -> list[str]:
    """Looks an option up by its command and flag, then by its flag, then by its kind."""
    keys = (f"{option.command} {option.flag}", option.flag, kind)
    return next(table[key] for key in keys if key in table)


@dataclass(frozen=True)
class Outcome:
    status: int
    said: str
    told: str


def options() -> list[Option]:
    """Returns all options of both commands, including positional ones and flags, except those that only print help."""
    return [
        option
        for program in PROGRAMS
        for command, parser in commands(program).items()
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
        for option in [_option(program, command, action)]
    ]


@cache
def commands(program: str) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of all commands; one inside another is named by both, such as `spill check`."""
    return dict(_commands_in(_parser(program), ()))


def _commands_in(parser: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for name, each in action.choices.items():
            each.complete()
            yield from _commands_in(each, (*names, name))
    if not inner:
        yield " ".join(names), parser


@cache
def _parser(program: str) -> argparse.ArgumentParser:
    return PROGRAMS[program]()


def outcome(program: str, arguments: list[str], environment: Mapping[str, str] = types.MappingProxyType({})) -> Outcome:
    """Returns the outcome of parsing a command line. Anything but an exit status is a bug, and propagates as its exception."""
    return _outcome(program, lambda: _parser(program), arguments, environment)


def outcome_of_variables(program: str, arguments: list[str], environment: Mapping[str, str]) -> Outcome:
    """The same with a new parser: the caller has set the variables."""
    return _outcome(program, PROGRAMS[program], arguments, environment)


def _outcome(
    program: str, parser: Callable[[], argparse.ArgumentParser], arguments: list[str], environment: Mapping[str, str]
) -> Outcome:
    def read() -> None:
        read_arguments = parser().parse_args(arguments)
        if (program, read_arguments.command) == ("attnstore", "serve"):
            load_serve_options(read_arguments, environment)

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = run_command(program, read, interrupted=130)
    return Outcome(status, out.getvalue(), error.getvalue())


def _option(program: str, command: str, action: argparse.Action) -> Option:
    flag = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    field = ServeOptions.model_fields.get(action.dest) if (program, command) == ("attnstore", "serve") else None
    if field is not None:
        return Option(program, command, flag, _kind_of_field(field), f"ATTNSTORE_{action.dest.upper()}", False)
    if action.dest == "config":
        kind: Kind = option_types.file_to_read  # as `load_serve_options` reads it
    elif action.nargs == 0:
        kind = bool
    else:
        kind = tuple(action.choices) if action.choices is not None else action.type
    assert kind is not None, f"{program} {command} {flag} takes any text: give it a type"
    _, marked, variable = (action.help or "").partition("[env ")
    return Option(program, command, flag, kind, variable.partition("]")[0] if marked else None, action.required)


def _kind_of_field(field: Any) -> Kind:
    metadata = list(field.metadata)
    for part in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(part) is Annotated:
            metadata += part.__metadata__
    kinds: list[Kind] = [each.func for each in metadata if isinstance(each, BeforeValidator)]
    if typing.get_origin(field.annotation) is Literal:
        kinds = [typing.get_args(field.annotation)]
    if field.annotation is bool:
        kinds = [bool]
    assert len(kinds) == 1, f"{field} takes anything: give it a type"
    return kinds[0]


class World:
    """A folder with files that options can name, and the values that are valid and invalid there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "file.txt"
        self.file.write_text("text\n")
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        calculated = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 8, "vocab_size": 9}
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(calculated))
        self.empty = folder / "empty"
        self.empty.mkdir()
        self.toml = folder / "node.toml"
        self.toml.write_text('node_id = "ada"\n')
        self.foreign = folder / "foreign.json"
        self.foreign.write_text('{"text_config": [], "num_hidden_layers": 1e999}')
        self.deep = folder / "deep.json"
        self.deep.write_text("[" * 100_000)

    def good(self, option: Option) -> list[str]:
        """Returns values that must not be refused."""
        new, file = str(self.folder / "new"), str(self.file)
        match option.kind:
            case Whole(least, most, multiple_of):
                return [str(least), str(most // multiple_of * multiple_of), str(least + multiple_of)]
            case Number(least, most, above):
                middle = min(1.0, most)
                return [*([] if above else [f"{least:g}"]), f"{most:.0f}", f"{middle}", f"{middle:e}", str(most / 1e3), ".5"]
            case Size():
                return self._good_sizes(option.kind)
            case SizeOrShare(size):
                return ["90%", "100%", "0.5%", "12.5 %", "1%", *self._good_sizes(size)]
            case Name(most):
                return ["ada", "ada-1.example", "Ada Lovelace", "Ada's 鸭", "0", "nan", "x" * most]
            case tuple():
                return [str(each) for each in option.kind]
            case Parsed(parse):
                return self._good_parsed(option, parse)
        table: dict[Kind, list[str]] = {
            option_types.bearer_token: ["s3cret", "a/b@c:d", "x" * 4_096],
            option_types.secret: ["pepper", "pep per", "redis://:pw@h/0", "鸭"],
            option_types.file_to_read: [str(self.toml) if option.flag == "--config" else file, "/dev/null"],
            option_types.text_to_read: [file, "-", "/dev/stdin"],
            option_types.file_to_write: [file, new, "/dev/null", "new.txt"],
            option_types.folder_to_read: [str(self.empty), "/dev", "."],
            option_types.folder_to_make: [new, f"{new}/deeper/still", "new"],
            option_types.http_url: ["http://127.0.0.1:8000", "https://worker.example.org/prefix", "http://[::1]:8000/"],
            option_types.http_proxy: ["http://proxy:3128", "http://ada:pass@proxy.example.org:3128"],
            "quota SIZE": ["none", "0", "10GiB", "123"],
            "cluster-key FILE": [file, new],
            "explain --from": [file, "http://127.0.0.1:8000"],
        }
        return _values(table, option, option.kind)

    def _good_sizes(self, kind: Size) -> list[str]:
        return [str(kind.least), str(kind.most), "5MiB", "8388608", "1.5MiB", "4 KiB", "64kb"]

    def _good_parsed(self, option: Option, parse: Callable[[str], object]) -> list[str]:
        targets = ["grpc://127.0.0.1:7400", "grpcs://node.example.org:7400", "grpc://[::1]:7400", "grpc://a:1,b:2?replicas=2"]
        directories = ["redis://h", "rediss://ada:pa%40ss@h:1/2?cluster=x", "redis+sentinel://h/svc/0", "redis+cluster://h,i"]
        table: dict[Kind, list[str]] = {
            "health URL": targets[:3],
            checked_target: [*targets, *directories],
            device_name: ["cpu", "cuda", "cuda:0", "cuda:15", "auto", "simulated"],
            "serve --directory": directories,
            "serve --listen": ["127.0.0.1:0", "[::1]:7400", "localhost:7400"],
            "serve --advertise": ["store-1", "store-1:7400", "10.0.0.1", "[fd00::1]:9000", "::1"],
            "serve --transports": ["tcp", "shm,tcp", "none"],
            "plan --model": ["llama-3-8b", "Llama-3-8B", str(self.config)],
            "plan --gpu": ["h100", "8xH800", "1024xmi300x"],
            "plan --link": ["100g", "loopback", "5g", "inf", "2.5g/100m@30ms~2ms"],
            "plan --context": ["1", "6000", "32k", "1.5K", "1m", "1e3", "100000000"],
            "serve --host": ["127.0.0.1", "::1", "[::1]", "worker.example.org", "0.0.0.0"],
            "--model": [str(self.model)],
        }
        return _values(table, option, parse)

    def bad(self, option: Option) -> list[str]:
        """Returns values that must be refused."""
        empty = ["", " ", "\t\n"]
        digits = [
            "-1",
            "x",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "\u0663",
            "\uff11\uff12",
            "1_0",
            "0x10",
            "9" * 5_000,
            "1,5",
            "\ud800",
            "1\0",
        ]
        paths = ["/nowhere/file", "/dev/null/file", str(self.file / "x"), "a\0b", "\ud800", "x" * 5_000, "/x" * 5_000]
        match option.kind:
            case Whole(least, most, multiple_of):
                off = [str(least + 1)] if multiple_of > 1 else []
                return [*empty, *digits, str(least - 1), str(most + 1), "1.5", "1e3", *off]
            case Number(least, most, above):
                over = [f"{math.nextafter(most, math.inf)!r}", "-0.001", "1e99"]
                return [*empty, *digits, *over, *(["0", "-0", "0.0", "1e-400"] if above and least == 0 else [])]
            case Size():
                return [*empty, *digits, *self._bad_sizes(option.kind)]
            case SizeOrShare(size):
                return [
                    *empty,
                    *digits,
                    *self._bad_sizes(size),
                    "0%",
                    "0.0%",
                    "100.1%",
                    "101%",
                    "-1%",
                    "%",
                    "90 % ",
                    "1e1%",
                    "\u0663%",
                ]
            case Name(most):
                return [*empty, "a\nb", "a\0b", "\x1b[2J", "\ud800", "x" * (most + 1), "a\u202eb"]
            case tuple():
                return [*empty, "x", "-1", option.kind[0] + " ", option.kind[0].upper(), "\ud800", "x" * 5_000]
            case Parsed(parse):
                return [*empty, *self._bad_parsed(option, parse)]
        table: dict[Kind, list[str]] = {
            option_types.bearer_token: ["to ken", "tökén", "a\nb", "a\0b", "\ud800", "x" * 5_000],
            option_types.secret: ["\ud800", "x" * 5_000],
            option_types.file_to_read: [*paths, str(self.folder), "absent"],
            option_types.text_to_read: [*paths, str(self.folder), "absent"],
            option_types.file_to_write: [*paths, str(self.folder), "absent/file"],
            option_types.folder_to_read: [*paths, str(self.file), "absent"],
            option_types.folder_to_make: [*paths[1:], str(self.folder), str(self.file)],
            option_types.http_url: [
                "h:1",
                "ftp://h",
                "http://",
                "http://h:x",
                "http://h:0",
                "http://a b",
                "http://h\n",
                "http://ü",
                "-1",
            ],
            option_types.http_proxy: [
                "h:1",
                "https://h:1",
                "http://h",
                "http://h:0",
                "http://:1",
                "http://h:1\n",
                "http://h:\u0663",
            ],
            "quota SIZE": [*digits, "None", "1 2"],
            "cluster-key FILE": [*paths, str(self.folder)],
            "explain --from": [*paths, str(self.folder), "absent", "ftp://h/x", "http://"],
        }
        return [*empty, *_values(table, option, option.kind)]

    def _bad_sizes(self, kind: Size) -> list[str]:
        return [str(kind.most + 1), "5XiB", "MiB", "1 2", "999999EiB", *([str(kind.least - 1)] if kind.least else [])]

    def _bad_parsed(self, option: Option, parse: Callable[[str], object]) -> list[str]:
        addresses = [
            "h:99999",
            "h:-1",
            "h:\u0663",
            "h:" + "9" * 5_000,
            "a b:1",
            "::1:7400",
            "[h]:1",
            "127.1:1",
            "a\0b:1",
            "\ud800:1",
        ]
        targets = ["h:1", "http://h:1", "grpc://", "grpc://h", "grpc://h:x", "grpc://a:1,,b:2", "grpc://a:1,a:1", "grpc://a:1?x=2"]
        directories = ["redis://", "redis://h:x", "redis://:p#ss@h", "redis://h/x", "redis://h?ca=x", "redis+sentinel://h"]
        table: dict[Kind, list[str]] = {
            "health URL": [*targets, "redis://h", "grpc://a:1,b:2"],
            device_name: ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1234", "cuda:\u0663", "cpu:0", "auto ", "\ud800", "cuda:0\n"],
            checked_target: [*targets, *directories, "grpc://a:1,b:2?replicas=\u0663", "grpc://a:1,b:2?replicas=" + "9" * 5_000],
            "serve --directory": [*directories, "grpc://h:1", "h:1"],
            "serve --listen": [*addresses, "h", "7400"],
            "serve --advertise": [*addresses, "a b"],
            "serve --transports": ["pigeon", "tcp,", "tcp,none", "TCP", "\ud800"],
            "plan --model": ["gpt-9", "/nowhere/config.json", str(self.foreign), str(self.deep), str(self.file), "a\0b.json"],
            "plan --gpu": ["abacus", "0xh100", "1025xh100", "-1xh100", "\u0663xh100", "9" * 5_000 + "xh100", "x", "8x"],
            "plan --link": [
                "string",
                "0g",
                "-1g",
                "\u0663g",
                "nan",
                "1g@infms",
                "1g@1ms~2ms",
                "9" * 400 + "g",
                "1g@" + "9" * 400 + "ms",
            ],
            "plan --context": ["0", "-1", "much", "nan", "infk", "1e400", "\u0663", "0.2", "100000001", "k", "1kk"],
            "serve --host": ["a b", "h:1", "127.1", "[h]", "\ud800", "a\0b", "x" * 300],
            "--model": ["/nowhere/model", str(self.empty), str(self.file), "a\0b", "\ud800", "/x" * 5_000],
        }
        return _values(table, option, parse)

    def rest(self, option: Option | None, command: tuple[str, str]) -> tuple[list[str], list[str]]:
        """Returns options and positional arguments that the command needs besides this one."""
        flags, places = [], []
        for other in _of(command):
            if other == option or not (other.required or other.positional):
                continue
            if other.positional:
                places.append(self.good(other)[0])
            elif not (command[1] == "explain" and option is not None and option.flag in ("--from", "--prompt-file")):
                flags.append(f"{other.flag}={self.good(other)[0]}")
        if command[1] == "explain" and (option is None or option.flag not in ("--from", "--prompt-file")):
            flags.append(f"--from={self.file}")
        return flags, places

    def line(self, option: Option, value: str | None) -> list[str]:
        """Returns a command with this option at this value, and nothing else that it does not need."""
        command = (option.program, option.command)
        flags, _ = self.rest(option, command)
        if not option.positional:
            flags.append(option.flag if value is None else f"{option.flag}={value}")
        places = [value if other == option else self.good(other)[0] for other in _of(command) if other.positional]
        return [*option.command.split(), *flags, *(["--", *map(str, places)] if places else [])]


@cache
def _of(command: tuple[str, str]) -> list[Option]:
    return [option for option in options() if (option.program, option.command) == command]
