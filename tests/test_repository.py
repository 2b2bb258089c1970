"""The repository keeps its own promises: what is generated is current, what is written is true."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
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


_FOLDERS = ("attnstore/", "worker/", "experiments/", "tests/", "docs/", "deploy/", "proto/")


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
    missing |= {name for name in files if not any(any((ROOT / folder).rglob(name)) for folder in _FOLDERS)}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_named_in_the_documentation_exists(page: Path) -> None:
    named = re.findall(r"(?:python -m |`)((?:attnstore(?!\.v1)|attnstore_worker|experiments|tests)(?:\.\w+)+)", page.read_text())
    assert [name for name in named if not _is_importable(name)] == []


def _is_importable(name: str) -> bool:
    """Whether `name` is a module, or what a module or a class of it has. Looks at files: importing some of them needs torch."""
    parts = name.split(".")
    root = ROOT / "worker" if parts[0] == "attnstore_worker" else ROOT
    for length in range(len(parts), 0, -1):
        path = root.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return all(re.search(rf"\b{part}\b", file.read_text()) for part in parts[length:])
    return False


def test_every_module_opens_with_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert {requirement_name(item) for item in wanted} - {"attnstore"} <= pinned


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
