"""The common part of the commands: parsing of options, messages and exit status.

Owns: `CommandParser`, `run_command` and standard output. Invariants: a command that cannot be executed prints one line on standard
error and exits with status 2, whatever the user typed. An empty value is refused by the option's name, because it usually comes
from an unset shell variable and would mean the current folder, no token or no store.
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
"""The status that a shell reports for a command ended by SIGPIPE, such as `cat` when `head` has read enough."""
_MESSAGE_CHARS_MAX: Final = 2_000
_OPTION = re.compile(r"--[a-z-]+")
_WORD = re.compile(r"[a-z-]+")
"""An option or the name of a command, which cannot contain a password."""
_AMBIGUOUS = re.compile(r"(ambiguous option: [a-z-]+)=.*(?= could match)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that refuses empty values, and whose messages are one line without any text that may contain a password.

    The parsers of its subcommands are of this class too.
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
    """Runs `command` and returns the exit status: its own (None: 0), 2 after an error message on standard error, or `interrupted`
    after SIGINT.
    """
    try:
        return command() or 0
    except SystemExit as ended:  # from the parser, or from `say`
        return ended.code if isinstance(ended.code, int) else 0
    except AttnStoreError as error:
        tell(program, str(error))
        return _USAGE
    except KeyboardInterrupt:
        return interrupted


def tell(program: str, message: str) -> None:
    """Prints an error in one line; line breaks and control characters are escaped."""
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message[:_MESSAGE_CHARS_MAX])
    print(f"{program}: {line}{'...' if len(message) > _MESSAGE_CHARS_MAX else ''}", file=sys.stderr)


def say(text: str, end: str = "\n") -> None:
    """Writes to standard output and flushes; characters that its encoding lacks are escaped. Ends the command silently if nobody
    reads the output any more. Raises `InvalidArgument` if it cannot be written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        # The interpreter flushes the rest again at exit; this discards it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(_BROKEN_PIPE) from None
        raise InvalidArgument(f"standard output cannot be written: {error.strerror}") from None
