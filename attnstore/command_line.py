"""What the commands have in common: how they read their options, and how they end.

Owns: `CommandParser`, `run_command` and standard output. Invariants: a command that cannot be done says so in one line
on standard error and ends with status 2, whatever was typed; an empty value is refused by its option's name, because it comes of a
variable that was not set in the caller's shell, and would mean the current folder, no token or no store.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from attnstore.errors import AttnStoreError, InvalidArgument
from attnstore.option_types import InvalidValue
from attnstore.secrecy import may_have_login

_USAGE: Final = 2
_BROKEN_PIPE: Final = 128 + signal.SIGPIPE
"""What a shell sees of a command that SIGPIPE has ended, as it ends `cat` when `head` has read enough."""
_MESSAGE_CHARS_MAX: Final = 2_000
_OPTION = re.compile(r"--[a-z-]+")
_WORD = re.compile(r"[a-z-]+")
"""An option or the name of a command: no place for a password."""
_AMBIGUOUS = re.compile(r"(ambiguous option: [a-z-]+)=.*(?= could match)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no empty values, and whose messages are one line and show nothing that may be a password or
    have one in it.

    Its subcommands' parsers are of this class too.
    """

    add_late: Callable[[CommandParser], None] | None = None
    """Adds the options of a command whose packages may not be installed, when that command is parsed."""

    def complete(self) -> None:
        """Adds the options that `add_late` has to add, once."""
        if self.add_late is not None:
            add, self.add_late = self.add_late, None
            add(self)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.complete()
        given = sys.argv[1:] if args is None else list(args)
        for before, argument in zip(["", *given], given, strict=False):
            option, equals, value = argument.partition("=")
            if not argument:
                self.error(f"the value after {before if _WORD.fullmatch(before) else self.prog} is empty")
            if equals and not value and _OPTION.fullmatch(option):
                self.error(f"the value of {option} is empty")
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for argument in unknown if _OPTION.fullmatch(name := argument.partition("=")[0])]
            self.error(f"{len(unknown)} arguments are not understood{': ' if names else ''}{', '.join(names)}")
        return known

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="") if file is sys.stdout else super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        message = _AMBIGUOUS.sub(r"\1", message)
        reason = sys.exception()
        is_safe = reason is not None and isinstance(reason.__context__, InvalidValue)
        if not is_safe and may_have_login(message):
            message = re.split("['\"]", message, maxsplit=1)[0].rstrip(": ")
        tell(self.prog, message)
        raise SystemExit(_USAGE)


def run_command(program: str, command: Callable[[], int | None], *, interrupted: int) -> int:
    """Runs `command` and returns the exit status: its own (None: 0), 2 after a line on standard error that says what is wrong, or
    `interrupted` after SIGINT.
    """
    try:
        return command() or 0
    except SystemExit as ended:  # of the parser, or of `say`
        return ended.code if isinstance(ended.code, int) else 0
    except AttnStoreError as error:
        tell(program, str(error))
        return _USAGE
    except KeyboardInterrupt:
        return interrupted


def tell(program: str, message: str) -> None:
    """Says what is wrong, in one line: what would break it, or command a terminal, is escaped."""
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message[:_MESSAGE_CHARS_MAX])
    print(f"{program}: {line}{'...' if len(message) > _MESSAGE_CHARS_MAX else ''}", file=sys.stderr)


def say(text: str, end: str = "\n") -> None:
    """Writes to standard output, at once; what its encoding lacks is escaped. Ends the command, without a word, where nobody reads
    it any more. Raises `InvalidArgument` where it cannot be written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        # The interpreter writes what is left once more when it ends: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(_BROKEN_PIPE) from None
        raise InvalidArgument(f"standard output cannot be written: {error.strerror}") from None
