"""Checks of the repository: generated files are current, and the documentation is true."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from attnstore.wire.v1 import store_pb2

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(
    path
    for package in ("attnstore", "worker", "experiments")
    for path in (ROOT / package).rglob("*.py")
    if path.parent != ROOT / "attnstore" / "wire" / "v1"
)


DECISIONS = ROOT / "docs" / "decisions"
PAGE_LINES = 90
HALF_A_PAGE_LINES = 32
LINE_CHARS = 132
PACKAGE_FILE_LINES_MAX = 400
FILE_LINES_MAX = 450
PUBLIC_METHODS_MAX = 20
_PACKAGES = ("attnstore/", "worker/")
_FOLDERS = ("attnstore/", "worker/", "experiments/", "tests/", "docs/", "deploy/", "proto/")


@cache
def _modules() -> list[Path]:
    return [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.py")]


@cache
def _own_modules() -> list[Path]:
    """Every module that is not generated."""
    return [path for path in _modules() if path.parent != ROOT / "attnstore" / "wire" / "v1"]


def _records() -> list[Path]:
    return sorted(DECISIONS.glob("[0-9]*.md"))


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


def _without_json_names(file: descriptor_pb2.FileDescriptorProto) -> str:
    """The compiler's descriptor spells out default JSON names, the generated module's does not."""
    return re.sub(r" *json_name: .*\n", "", str(file))


def test_the_committed_stubs_are_those_of_the_protocol(tmp_path: Path) -> None:
    described = tmp_path / "store.binpb"
    mapping = "-Iattnstore/wire/v1=proto/attnstore/v1"
    run_python("-m", "grpc_tools.protoc", mapping, f"--descriptor_set_out={described}", "proto/attnstore/v1/store.proto")
    fresh = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file[0]
    committed = descriptor_pb2.FileDescriptorProto()
    store_pb2.DESCRIPTOR.CopyToProto(committed)
    assert _without_json_names(fresh) == _without_json_names(committed), "run make proto and commit"


def test_the_service_is_named_as_the_protocol_publishes_it() -> None:
    assert store_pb2.DESCRIPTOR.services_by_name["AttentionStore"].full_name == "attnstore.v1.AttentionStore"


@pytest.mark.parametrize("command", ["attnstore", "attnstore-worker"])
def test_the_console_scripts_resolve(command: str) -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert callable(script.load())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_named_in_the_documentation_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize(
    ("command", "module"), [("attnstore serve", "attnstore.cli"), ("attnstore-worker generate", "attnstore_worker.cli")]
)
def test_every_option_named_in_the_readme_exists(command: str, module: str) -> None:
    uses = re.findall(rf"^(?:\$ )?{re.escape(command)} (.*)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert uses, f"the README does not show {command}"
    offered = set(re.findall(r"--[a-z][a-z-]*", run_python("-m", module, command.split()[1], "--help")))
    assert set(re.findall(r"--[a-z][a-z-]*", " ".join(uses))) <= offered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_named_in_the_documentation_exists(page: Path) -> None:
    """A span in backticks is a path if it begins with a folder of the repository or ends in `.py`. It may have wildcards, and a
    `.py` file may be named by the end of its path.
    """
    code = set(re.findall(r"`([^`\s]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)))
    paths = {name for name in code if name.startswith(_FOLDERS)}
    files = {name for name in code - paths if re.fullmatch(r"[\w/*]+\.py", name)}
    missing = {name for name in paths if not any(ROOT.glob(name.rstrip("/")))}
    missing |= {name for name in files if not any(path.match(name) for path in _modules())}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_named_in_the_documentation_exists(page: Path) -> None:
    named = re.findall(r"(?:python -m |`)((?:attnstore(?!\.v1)|attnstore_worker|experiments|tests)(?:\.\w+)+)", page.read_text())
    assert [name for name in named if not _is_importable(name)] == []


def _is_importable(name: str) -> bool:
    """Returns whether `name` is a module, or a member of a module or class. Looks at files, because importing some of them needs
    torch.
    """
    parts = name.split(".")
    root = ROOT / "worker" if parts[0] == "attnstore_worker" else ROOT
    for length in range(len(parts), 0, -1):
        path = root.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return all(re.search(rf"\b{part}\b", file.read_text()) for part in parts[length:])
    return False


def test_every_limit_named_in_the_documentation_exists() -> None:
    limits = r"[A-Z][A-Z0-9_]*_(?:MAX|MIN|DEFAULT)\b"
    defined = {name for path in SOURCES for name in re.findall(rf"^{limits}", path.read_text(), flags=re.MULTILINE)}
    named = {name: page.name for page in PAGES for name in re.findall(rf"`({limits})`", page.read_text())}
    assert {name: page for name, page in named.items() if name not in defined} == {}


def test_every_decision_is_in_the_index_and_has_a_status() -> None:
    rows = re.findall(r"^\| \[(\d{4})\]\(([^)]+)\) \| .+ \| (.+) \|$", (DECISIONS / "README.md").read_text(), flags=re.MULTILINE)
    assert [name for _, name, _ in rows] == [path.name for path in _records()]
    assert all(name.startswith(number) for number, name, _ in rows)
    numbers = [number for number, _, _ in rows]
    for number, _, status in rows:
        assert re.fullmatch(r"accepted|(?:partly )?superseded by \[\d{4}\]\([^)]+\)(?:, \[\d{4}\]\([^)]+\))*", status), number
        assert all(later > number and later in numbers for later in re.findall(r"\[(\d{4})\]", status)), number


@pytest.mark.parametrize("record", _records(), ids=lambda record: record.stem)
def test_a_decision_is_half_a_page(record: Path) -> None:
    text = record.read_text()
    assert text.startswith(f"# {record.name[:4]}")
    assert len(text.splitlines()) <= HALF_A_PAGE_LINES


def test_the_architecture_is_one_page() -> None:
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    assert len(lines) <= PAGE_LINES
    assert all(len(line) <= LINE_CHARS for line in lines if not line.startswith("|"))


def test_every_module_opens_with_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _own_modules()}
    longest = {name: PACKAGE_FILE_LINES_MAX if name.startswith(_PACKAGES) else FILE_LINES_MAX for name in lengths}
    assert {name: lines for name, lines in lengths.items() if lines > longest[name]} == {}


def test_no_class_has_too_many_public_methods() -> None:
    """A property counts as a method, and a method with overloads counts once."""
    counts = {}
    for path in _own_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = {member.name for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)}
                counts[f"{path.relative_to(ROOT)} {node.name}"] = sum(not name.startswith("_") for name in names)
    assert {name: count for name, count in counts.items() if count > PUBLIC_METHODS_MAX} == {}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert {requirement_name(item) for item in wanted} - {"attnstore"} <= pinned


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
