"""The types of options: one parser per kind, for the command line, variables and TOML files.

Owns: the kinds. Each takes the given text (a number in a file is converted to text) and returns the value. Invariants: a returned
value is usable, because its meaning was checked here before any work begins; a refused value raises `InvalidValue`, one line with
the rule, which shows the text only if it cannot be a secret.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TextIO, TypeVar
from urllib.parse import urlsplit

from attnstore.errors import InvalidArgument
from attnstore.http_client import is_http_proxy
from attnstore.limits import DEADLINE_MS_MAX, SECRET_CHARS_MAX
from attnstore.secrecy import shown
from attnstore.sizes import Share, parse_share, parse_size, size_text
from attnstore.tokens import is_token

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,20}")
_DECIMAL: Final = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?")
_STANDARD_INPUT: Final = Path("-")

T = TypeVar("T")


class InvalidValue(InvalidArgument, argparse.ArgumentTypeError):
    """A value that its option cannot have. It has two bases, so that argparse, pydantic and callers all handle it."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from `least` to `most`, a multiple of `multiple_of`."""

    least: int
    most: int
    multiple_of: int = 1

    def __call__(self, given: object) -> int:
        text = _number_text(given)
        number = int(text) if _WHOLE.fullmatch(text) else None
        if number is None or not self.least <= number <= self.most or number % self.multiple_of:
            multiple = f" that is a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
            raise InvalidValue(f"{shown(text)} is not a whole number from {self.least} to {self.most}{multiple}")
        return number


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `least`, or `above` it, to `most`; `unit` is shown in messages."""

    least: float
    most: float
    above: bool = False
    unit: str = ""

    def __call__(self, given: object) -> float:
        text = _number_text(given)
        number = float(text) if _DECIMAL.fullmatch(text) else math.nan
        if not self.least <= number <= self.most or (self.above and number == self.least):
            bounds = f"above {self.least:g} and at most" if self.above else f"from {self.least:g} to"
            raise InvalidValue(f"{shown(text)} is not a number {bounds} {self.most:g}{self.unit and ' ' + self.unit}")
        return number


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes from `least` to `most`, with or without a unit."""

    least: int
    most: int

    def __call__(self, given: object) -> int:
        text = _number_text(given)
        size = parse_size(text)
        if size is None or not self.least <= size <= self.most:
            bounds = f"from {size_text(self.least)} to {size_text(self.most)}"
            raise InvalidValue(f"{shown(text)} is not a size {bounds}, for example 512MiB")
        return size


@dataclass(frozen=True, slots=True)
class SizeOrShare:
    """Bytes as of `Size`, or a share of a whole that is measured later, such as `90%`."""

    size: Size

    def __call__(self, given: object) -> int | Share:
        text = _number_text(given)
        if not text.endswith("%"):
            return self.size(given)
        share = parse_share(text)
        if share is None:
            raise InvalidValue(f"{shown(text)} is not a share above 0% and at most 100%")
        return share


@dataclass(frozen=True, slots=True)
class Name:
    """Printable text of at most `most` characters."""

    most: int

    def __call__(self, given: object) -> str:
        text = _text(given)
        if len(text) > self.most or not text.isprintable():
            raise InvalidValue(f"{shown(text)} is not a name of at most {self.most} printable characters")
        return text


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """The result of `parse` for a text. `parse` raises `InvalidArgument`, without a secret in its message, for a text that it does
    not accept.
    """

    parse: Callable[[str], T]

    def __call__(self, given: object) -> T:
        try:
            return self.parse(_text(given))
        except InvalidArgument as error:
            raise InvalidValue(str(error)) from None


MILLISECONDS: Final = Number(0, DEADLINE_MS_MAX, above=True, unit="ms")
SECONDS: Final = Number(0, DEADLINE_MS_MAX / 1e3, above=True, unit="s")
PORT: Final = Whole(0, 65_535)


def bearer_token(given: object) -> str:
    """A bearer token. Never shown."""
    text = _text(given)
    if not is_token(text) or len(text) > SECRET_CHARS_MAX:
        raise InvalidValue(f"must be printable ASCII without spaces, {SECRET_CHARS_MAX} characters at most")
    return text


def secret(given: object) -> str:
    """Any text. Never shown."""
    text = _text(given)
    try:
        too_long = len(text.encode()) > SECRET_CHARS_MAX
    except UnicodeEncodeError:
        raise InvalidValue("must be text in UTF-8") from None
    if too_long:
        raise InvalidValue(f"must have {SECRET_CHARS_MAX} bytes at most")
    return text


def file_or_folder(given: object) -> Path:
    """The path of an existing file or folder."""
    path, name, kind = _looked_at(given)
    if kind is None:
        raise InvalidValue(f"{name} is not there")
    return path


def file_to_read(given: object) -> Path:
    """A file, pipe or device that can be read. A pipe is not opened here, because it can be read only once."""
    path, name, kind = _looked_at(given)
    if kind is None:
        raise InvalidValue(f"{name} cannot be read: it is not there")
    if stat.S_ISDIR(kind):
        raise InvalidValue(f"{name} is a folder, where a file is needed")
    _require_access(path, name, kind, os.O_RDONLY, os.R_OK, "read")
    return path


def text_to_read(given: object) -> Path:
    """As `file_to_read`, or `-` for standard input."""
    return _STANDARD_INPUT if given == "-" else file_to_read(given)


def read_text(path: Path, chars_max: int) -> str:
    """Returns the text of a file, or of standard input if the path is `-`. Raises `InvalidValue` unless it is UTF-8 and not too
    long.
    """
    where = "standard input" if path == _STANDARD_INPUT else shown(str(path))
    try:
        if path == _STANDARD_INPUT:
            text = _standard_input().read(chars_max + 1)
        else:
            with path.open(encoding="utf-8") as file:
                text = file.read(chars_max + 1)
    except OSError as error:
        raise InvalidValue(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{where} is not UTF-8: {error.reason}") from None
    if len(text) > chars_max:  # a device may have no end
        raise InvalidValue(f"{where} has more than {chars_max} characters")
    return text


def file_to_write(given: object) -> Path:
    """A file that can be written, or created. Checking changes no existing file and leaves no new one."""
    path, name, kind = _looked_at(given)
    if kind is None:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            path.unlink()
        except OSError as error:
            raise InvalidValue(f"{name} cannot be written: {error.strerror}") from None
    elif stat.S_ISDIR(kind):
        raise InvalidValue(f"{name} is a folder, where a file is needed")
    else:
        _require_access(path, name, kind, os.O_WRONLY, os.W_OK, "written")
    return path


def folder_to_read(given: object) -> Path:
    """The path of an existing folder."""
    path, name, kind = _looked_at(given)
    if kind is None:
        raise InvalidValue(f"{name} cannot be read: it is not there")
    if not stat.S_ISDIR(kind):
        raise InvalidValue(f"{name} is not a folder")
    return path


def folder_to_make(given: object) -> Path:
    """A folder that does not exist yet and can be created, with its missing parents."""
    path, name, kind = _looked_at(given)
    if kind is not None:
        raise InvalidValue(f"{name} is there already")
    above = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise InvalidValue(f"{name} cannot be made in {shown(str(above))}")
    return path


def http_url(given: object) -> str:
    """The URL of a worker, or of a proxy in front of it. It is shown, so a URL with a login is refused."""
    text = _text(given)
    try:
        parts = urlsplit(text)
        taken = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in text
    except ValueError:
        taken = False
    if not (taken and re.fullmatch("[!-~]+", text)):
        raise InvalidValue(f"{shown(text)} is not http://host:port or https://host:port")
    return text


def http_proxy(given: object) -> str:
    """The URL of an HTTP proxy, which may contain a login. Never shown."""
    text = _text(given)
    if not is_http_proxy(text):
        raise InvalidValue("must be http://host:port")
    return text


def _standard_input() -> TextIO:
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):  # independent of the locale, and without an escape for invalid bytes
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin


def _number_text(given: object) -> str:
    """Returns the text of a value, which may be a number in a file."""
    return str(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else _text(given)


def _text(given: object) -> str:
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if not isinstance(given, str):
        raise InvalidValue("must be text")
    if not given.strip():
        raise InvalidValue("is empty")
    return given


def _looked_at(given: object) -> tuple[Path, str, int | None]:
    """Returns a path, its text for messages, and its mode, or None if it does not exist."""
    text = _text(given)
    path, name = Path(text), shown(text)  # a path object does not show the given text exactly: it has no `//`
    try:
        return path, name, path.stat().st_mode
    except FileNotFoundError:
        return path, name, None
    except OSError as error:
        raise InvalidValue(f"{name} cannot be used: {error.strerror}") from None
    except ValueError:  # a character that no path may contain
        raise InvalidValue(f"{name} is not a path") from None


def _require_access(path: Path, name: str, kind: int, flags: int, access: int, verb: str) -> None:
    """Opens a regular file, because root's permissions would not tell. Does not open a pipe or device, because opening it may have
    effects.
    """
    try:
        if stat.S_ISREG(kind):
            os.close(os.open(path, flags | os.O_CLOEXEC))
        elif not os.access(path, access):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InvalidValue(f"{name} cannot be {verb}: {error.strerror}") from None
