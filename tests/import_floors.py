"""Counts the import floors of our packages, and fails over a bound: `python -m tests.import_floors`, a part of `make layers`.

Owns: the definition, and the bounds. A package's number of floors is the length of the longest chain of imports between the modules
and packages that lie directly in it. A package inside counts as one floor, and has floors of its own. Every import counts, those in
functions and those for type checking too, because a reader follows them all. The package's own `__init__` is not a floor, but a
module that imports it can close a circle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import grimp

OURS = ("attnstore", "attnstore_worker", "experiments")
# A bound holds for the packages inside, too.
FLOORS_MAX = {"attnstore.client": 6, "attnstore_worker.cache": 8}


@dataclass(frozen=True)
class Floors:
    """The longest chain of imports between what lies in a package, from the top down; and a circle, where there is one."""

    package: str
    chain: tuple[str, ...] = ()
    circle: tuple[str, ...] = ()

    @property
    def most(self) -> int | None:
        """The bound on the chain's length, if there is one."""
        bounds = (bound for package, bound in FLOORS_MAX.items() if f"{self.package}.".startswith(f"{package}."))
        return min(bounds, default=None)

    @property
    def is_broken(self) -> bool:
        return bool(self.circle) or (self.most is not None and len(self.chain) > self.most)

    def __str__(self) -> str:
        bound = "" if self.most is None else f" of {self.most}"
        told = f"a circle: {' -> '.join(self.circle)}" if self.circle else " -> ".join(self.chain)
        return f"{'BROKEN' if self.is_broken else 'kept':7}{self.package:36}{f'{len(self.chain)}{bound}':7}{told}"


def floors_of(graph: grimp.ImportGraph, package: str) -> Floors:
    """The floors of one package of the graph."""
    inside = {child: {child, *graph.find_descendants(child)} for child in graph.find_children(package)}
    floor_of = {module: child for child, modules in inside.items() for module in modules} | {package: package}
    imports: dict[str, set[str]] = {floor: set() for floor in (*inside, package)}
    for module, floor in floor_of.items():
        imports[floor] |= {floor_of.get(name, floor) for name in graph.find_modules_directly_imported_by(module)} - {floor}
    try:
        order = tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return Floors(package, circle=tuple(_short(name, package) for name in reversed(error.args[1])))
    return Floors(package, tuple(_short(name, package) for name in _longest(order, imports, package)))


def _longest(order: Iterable[str], imports: Mapping[str, set[str]], package: str) -> tuple[str, ...]:
    """The longest chain, without the package itself. `order` has whatever a floor imports before the floor."""
    below: dict[str, tuple[str, ...]] = {}
    for floor in order:
        below[floor] = max((below[name] for name in sorted(imports[floor] - {package})), key=len, default=())
        below[floor] = (floor, *below[floor])
    return max((below[floor] for floor in sorted(below.keys() - {package})), key=len)


def _short(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.")


def all_floors(graph: grimp.ImportGraph, roots: Iterable[str] = OURS) -> list[Floors]:
    """The floors of every package that holds anything, by name."""
    return [floors_of(graph, name) for name in sorted(graph.modules) if graph.find_children(name) and name.split(".")[0] in roots]


def main() -> int:
    found = all_floors(grimp.build_graph(*OURS, cache_dir=None))
    for floors in found:
        print(floors)
    return 1 if any(floors.is_broken for floors in found) else 0


if __name__ == "__main__":
    sys.exit(main())
