"""Which modules of ours work with which optional packages: read from their imports and from pyproject.toml.

Owns: `imports_of`, `needs` and `promised`. A module *needs* the packages that a Python must have to import it and the modules of
ours that it imports. A set of extras *promises* the modules whose needs it covers. An import in a function, or for type checking,
is late: the module can be imported without it.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from sys import stdlib_module_names
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Final[dict[str, list[str]]] = PROJECT["optional-dependencies"]
BASE: Final = ""
"""Stands for the installation without extras."""
SHIPPED: Final = {"attnstore": ROOT / "attnstore", "attnstore_worker": ROOT / "worker" / "attnstore_worker"}
OURS: Final = {**SHIPPED, "experiments": ROOT / "experiments", "tests": ROOT / "tests"}

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Imports:
    """Full names that one module imports: while it is imported itself, and later."""

    at_once: frozenset[str]
    late: frozenset[str]


def imports_of(source: str) -> Imports:
    """The imports of a module with this source. `from a import b` counts as `a.b`."""
    at_once: set[str] = set()
    late: set[str] = set()
    for node, is_late in _statements(ast.parse(source).body, False):
        names = late if is_late else at_once
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return Imports(frozenset(at_once), frozenset(late))


def _statements(nodes: Iterable[ast.AST], is_late: bool) -> Iterator[tuple[ast.AST, bool]]:
    for node in nodes:
        yield node, is_late
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _statements(node.body, True)
            yield from _statements(node.orelse, is_late)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(ast.iter_child_nodes(node), is_late or is_function)


@cache
def modules() -> Mapping[str, Imports]:
    """The imports of every module of ours, by its name."""
    found = {}
    for package, folder in OURS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = imports_of(path.read_text())
    return found


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in OURS


def foreign(names: Iterable[str]) -> frozenset[str]:
    """The packages, by the names that they are imported by, that belong to neither us nor Python."""
    tops = {name.partition(".")[0] for name in names}
    return frozenset(tops - OURS.keys() - stdlib_module_names)


@cache
def needs(module: str) -> frozenset[str]:
    """The packages without which `module` cannot be imported."""
    reached, waiting = {module}, [module]
    while waiting:
        name = waiting.pop()
        found = modules()[name].at_once if name in modules() else ()
        for imported in {each for full in (name, *found) if is_ours(full) for each in _with_parents(full)} - reached:
            reached.add(imported)
            waiting.append(imported)
    return foreign(full for name in reached & modules().keys() for full in modules()[name].at_once)


def _with_parents(name: str) -> list[str]:
    """A module's import runs the packages that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def requirements(extra: str) -> frozenset[str]:
    """The distributions that an extra asks for, in lower case, with those of the extras that it names and of the base."""
    found = {distribution(each) for each in PROJECT["dependencies"]}
    for requirement in EXTRAS[extra] if extra else ():
        if own := re.match(r"attnstore\[(.*)\]", requirement):
            found |= {each for name in own[1].split(",") for each in requirements(name)}
        else:
            found.add(distribution(requirement))
    return frozenset(found)


def installed_with(distributions: Iterable[str]) -> frozenset[str]:
    """These distributions, and all that are installed with them because they ask for them."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):  # of another platform
                waiting += [distribution(line) for line in requires(name) or () if "extra ==" not in line]
    return frozenset(found)


def distribution(requirement: str) -> str:
    """The normal form of the name in a requirement."""
    match = _NAME.match(requirement)
    assert match is not None
    return _normal(match[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _distributions() -> Mapping[str, frozenset[str]]:
    return {name: frozenset(map(_normal, brought_by)) for name, brought_by in packages_distributions().items()}


def brought_by(package: str) -> frozenset[str]:
    """The distributions that bring an importable package; none where it is not installed here."""
    return _distributions().get(package, frozenset())


def packages(distributions: Iterable[str]) -> frozenset[str]:
    """The names by which the packages of these distributions are imported."""
    wanted = set(distributions)
    return frozenset(name for name, brought in _distributions().items() if brought & wanted)


def covers(distributions: frozenset[str], package: str) -> bool:
    return bool(brought_by(package) & distributions)


def promised(distributions: frozenset[str]) -> frozenset[str]:
    """The modules of ours, without the tests, that these distributions suffice for."""
    names = (name for name in modules() if not name.startswith("tests"))
    return frozenset(name for name in names if all(covers(distributions, package) for package in needs(name)))
