"""Random command lines, from a seed.

    python -m tests.fuzz_command_lines 10000 18

Owns: `fuzz`. Each line is parsed, not executed: it is accepted, or refused in one line; it leaves no state behind, and a valid
command beside each batch is parsed as before. A failure prints its line, which the same seed reproduces.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.command_options import NONSENSE, PROGRAMS, Option, World, _parser, commands, options, outcome

_BATCH = 100
_JUNK = (
    "--nonsense",
    "--",
    "-x",
    "-",
    "",
    "--=",
    "--store=",
    "serve",
    "generate",
    "--help=1",
    "--t",
    "--no-json",
    "@file",
    "\ud800",
)


def command_line(world: World, draw: random.Random) -> tuple[str, list[str]]:
    """Returns a program and its arguments: mostly its own options, some with valid values; sometimes twice, without a value, or
    junk.
    """
    program = draw.choice(list(PROGRAMS))
    command = draw.choice(list(commands(program)))
    own = [option for option in options_of(program) if option.command == command]
    flags, places = world.rest(None, (program, command)) if draw.random() < 0.8 else ([], [])
    for option in draw.choices(own, k=draw.randrange(6)):
        flags += _typed(world, option, draw)
    if draw.random() < 0.2:
        flags.insert(draw.randrange(len(flags) + 1), draw.choice([*_JUNK, draw.choice(NONSENSE)]))
    if draw.random() < 0.2:
        draw.shuffle(flags)
    if places and draw.random() < 0.2:
        places[draw.randrange(len(places))] = draw.choice(NONSENSE)
    head = command.split() if draw.random() < 0.95 else [draw.choice(NONSENSE)]
    return program, [*head, *flags, *(["--"] if places and draw.random() < 0.5 else []), *places]


def _typed(world: World, option: Option, draw: random.Random) -> list[str]:
    if option.kind is bool:
        return [option.flag]
    value = draw.choice([draw.choice(world.good(option)), draw.choice(world.bad(option)), draw.choice(NONSENSE)])
    if option.positional:
        return [value]
    flag = option.flag if draw.random() < 0.9 else option.flag[: draw.randrange(3, len(option.flag) + 1)]
    return draw.choice([[f"{flag}={value}"], [f"{flag}={value}"], [flag, value], [flag]])


def options_of(program: str) -> list[Option]:
    return _OPTIONS[program]


_OPTIONS = {program: [option for option in options() if option.program == program] for program in PROGRAMS}


def fuzz(world: World, draw: random.Random, count: int) -> Counter[int]:
    """Returns how many of `count` lines ended with each status. Raises `AssertionError` for one that ended in another way."""
    left = sorted(world.folder.rglob("*"))
    healthy = {
        (program, command): [*command.split(), *flags, *places]
        for program in PROGRAMS
        for command in commands(program)
        for flags, places in [world.rest(None, (program, command))]
    }
    read = {key: vars(_parser(key[0]).parse_args(line)) for key, line in healthy.items()}
    statuses: Counter[int] = Counter()
    for number in range(count):
        program, arguments = command_line(world, draw)
        try:
            done = outcome(program, arguments)
        except BaseException as error:
            raise AssertionError(f"{program} {arguments!r:.2000}") from error
        told = done.told
        assert done.status == 0 or (done.status == 2 and told[:-1].isprintable() and told[-1] == "\n"), (program, arguments, done)
        assert "Traceback" not in told
        statuses[done.status] += 1
        if number % _BATCH == _BATCH - 1:
            for key, line in healthy.items():
                assert vars(_parser(key[0]).parse_args(line)) == read[key], (key, program, arguments)
    assert sorted(world.folder.rglob("*")) == left, "reading a command leaves nothing behind"
    return statuses


def main() -> None:
    count, seed = (int(argument) for argument in (*sys.argv[1:], "10000", "18")[:2])
    for name in [name for name in os.environ if name.startswith("ATTNSTORE_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began_s = time.monotonic()
        statuses = fuzz(World(Path(folder)), random.Random(seed), count)
        print(
            f"{count} command lines from seed {seed} in {time.monotonic() - began_s:.0f} s: status {dict(statuses)}, no traceback"
        )
        os.chdir("/")


if __name__ == "__main__":
    main()
