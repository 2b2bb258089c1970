"""The import floors of packages that are written here: what is counted, what is a circle, what breaks a bound."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import grimp
import pytest

from tests import import_floors
from tests.import_floors import all_floors, floors_of

Graph = Callable[[dict[str, str]], grimp.ImportGraph]
_NUMBERS = count()


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Builds the graph of a new package with these files. `~` in a file's text stands for the package's name."""

    def build(files: dict[str, str]) -> grimp.ImportGraph:
        name = f"house{next(_NUMBERS)}"
        for path, text in {"__init__": "", **files}.items():
            file = tmp_path / name / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(text.replace("~", name))
        monkeypatch.syspath_prepend(tmp_path)
        return grimp.build_graph(name, cache_dir=None)

    return build


def root(graph: grimp.ImportGraph) -> str:
    return min(graph.modules, key=len)


def test_the_floors_are_the_longest_chain_and_not_the_number_of_modules(graph: Graph) -> None:
    built = graph({"top": "import ~.middle, ~.low", "middle": "from ~ import low", "low": "import os", "beside": "import ~.low"})
    assert floors_of(built, root(built)).chain == ("top", "middle", "low")


def test_a_package_inside_is_one_floor_and_has_floors_of_its_own(graph: Graph) -> None:
    built = graph(
        {"top": "import ~.room.a", "room/a": "import ~.room.b", "room/b": "import ~.room.c", "room/c": "import ~.low", "low": ""}
    )
    outer, inner = all_floors(built, [root(built)])
    assert (outer.chain, inner.chain) == (("top", "room", "low"), ("a", "b", "c"))


@pytest.mark.parametrize(
    "line",
    ["def late():\n    import ~.low", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ~.low import name"],
    ids=["in a function", "for type checking"],
)
def test_every_import_counts(graph: Graph, line: str) -> None:
    built = graph({"top": line, "low": "name = 1"})
    assert floors_of(built, root(built)).chain == ("top", "low")


def test_the_packages_door_is_no_floor(graph: Graph) -> None:
    built = graph({"__init__": "import ~.top", "top": "import ~.low", "low": ""})
    assert floors_of(built, root(built)).chain == ("top", "low")


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "import ~.b", "b": "import ~.c", "c": "import ~.a"}, {"a", "b", "c"}),
        ({"one/a": "import ~.two.a", "two/a": "", "two/b": "import ~.one.b", "one/b": ""}, {"one", "two"}),
        ({"__init__": "import ~.a", "a": "from ~ import name"}, {"~", "a"}),
    ],
    ids=["of modules", "of packages whose modules have none", "with the door"],
)
def test_a_circle_is_found_and_breaks_the_rule(graph: Graph, files: dict[str, str], circle: set[str]) -> None:
    built = graph(files)
    found = floors_of(built, root(built))
    assert {name.replace(root(built), "~") for name in found.circle} == circle
    assert found.is_broken


@pytest.mark.parametrize(("most", "broken"), [(2, False), (1, True)])
def test_a_bound_holds_for_a_package_and_for_the_packages_inside(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, most: int, broken: bool
) -> None:
    built = graph({"room/a": "import ~.room.b", "room/b": ""})
    monkeypatch.setattr(import_floors, "FLOORS_MAX", {root(built): most})
    outer, inner = all_floors(built, [root(built)])
    assert (outer.is_broken, inner.is_broken) == (False, broken)
    assert str(inner).startswith("BROKEN" if broken else "kept")


def test_the_command_ends_with_an_error_where_a_bound_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(import_floors, "FLOORS_MAX", {"attnstore.whatif": 1})
    assert import_floors.main() == 1
    assert "BROKEN attnstore.whatif" in capsys.readouterr().out
