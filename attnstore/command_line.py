"""What the commands' parsers have in common.

Owns: `CommandParser`. Invariant: an empty value is refused by its option's name, because it comes of a variable that was not set in
the caller's shell, and would mean the current folder, no token or no store.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from attnstore.secrecy import shown

_OPTION = re.compile(r"--[a-z-]+")
_AMBIGUOUS = re.compile(r"(ambiguous option: [a-z-]+)=\S*")


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no empty values, and whose messages show none that may be a password or have one in it.

    Its subcommands' parsers are of this class too.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        for before, argument in zip(["", *given], given, strict=False):
            option, equals, value = argument.partition("=")
            if not argument:
                self.error(f"the value after {before or self.prog} is empty")
            if option.startswith("--") and equals and not value:
                self.error(f"the value of {option} is empty")
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for argument in unknown if _OPTION.fullmatch(name := argument.partition("=")[0])]
            self.error(f"{len(unknown)} arguments are not understood{': ' if names else ''}{', '.join(names)}")
        return known

    def error(self, message: str) -> NoReturn:
        message = _AMBIGUOUS.sub(r"\1", message)
        if shown(message) != repr(message):
            message = re.split("['\"]", message, maxsplit=1)[0].rstrip(": ")
        super().error(message)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """For an option's `type`: a whole number of at least `least` and at most `most`."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {bounds}")
        return number

    return parse


def seconds(text: str) -> float:
    """A positive time for an option's `type`."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value
