"""What pyproject.toml asks for is what our modules import: nothing is missing, and nothing is asked for in vain."""

from __future__ import annotations

import re

import pytest

from tests.packages import (
    BASE,
    EXTRAS,
    PROJECT,
    ROOT,
    Imports,
    brought_by,
    distribution,
    foreign,
    imports_of,
    modules,
    needs,
    promised,
    requirements,
)

LIGHT_FOR_A_CLIENT = {"numba", "numpy", "prometheus_client", "pydantic", "torch", "grpc_reflection"}
ELSEWHERE = {
    "mooncake": "a peer that is measured where it is installed",
    "vllm": "it has an environment of its own",
    "huggingface_hub": "vLLM's package, imported in vLLM's process alone",
}
FOR_OTHERS = {
    "accelerate": "transformers imports it when it loads a model",
    "gguf": "transformers imports it when it reads a GGUF file",
    "jinja2": "transformers imports it when it renders a chat template",
}
OWNED = {
    BASE: {"attnstore", "attnstore.aio", "attnstore.cli", "attnstore.client", "attnstore.operations", "attnstore.whatif.command"},
    "node": {"attnstore.config", "attnstore.serve_command", "attnstore.server.node", "attnstore.telemetry"},
    "copying": {"attnstore.copying.kernel"},
    "attention": {"attnstore.attention.cpu", "attnstore.attention.triton", "attnstore.server.attend"},
    "worker": {"attnstore_worker.actions", "attnstore_worker.cache", "attnstore_worker.engine", "attnstore_worker.serve"},
    "redis": {"attnstore.cluster_key", "attnstore.directory.redis"},
    "experiments": {"experiments.demo", "experiments.bandwidth.plot", "experiments.compose_local.compose_file"},
}
"""Some modules that each extra is for, which tell that the rest of this file looks at something."""

USED_BY = {"worker": "attnstore_worker", "experiments": "experiments"}
"""The package of ours that an extra is for; the others are for `attnstore`."""


def test_imports_are_read_as_python_runs_them() -> None:
    source = """
import one, two.deep
from three import four
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import five
else:
    import six
try:
    import seven
except ImportError:
    pass
class Inside:
    import eight
    def method(self):
        import nine
async def later():
    from ten import eleven
"""
    assert imports_of(source) == Imports(
        frozenset({"one", "two.deep", "three.four", "typing.TYPE_CHECKING", "six", "seven", "eight"}),
        frozenset({"five", "nine", "ten.eleven"}),
    )


@pytest.mark.parametrize("extra", OWNED)
def test_an_extra_brings_what_its_modules_import(extra: str) -> None:
    assert OWNED[extra] <= promised(requirements(extra))


@pytest.mark.parametrize("extra", sorted(OWNED.keys() - {BASE}))
def test_the_base_alone_is_not_enough_for_what_an_extra_is_for(extra: str) -> None:
    assert not (OWNED[extra] - {"attnstore.server.attend"}) & promised(requirements(BASE))


def test_a_client_is_light() -> None:
    assert not needs("attnstore") & LIGHT_FOR_A_CLIENT
    assert not needs("attnstore.cli") & LIGHT_FOR_A_CLIENT


def test_every_module_works_with_some_extra() -> None:
    everything = promised(requirements("experiments"))
    left = {name for name in modules() if not name.startswith("tests")} - everything
    assert {name: needs(name) & ELSEWHERE.keys() for name in left if not needs(name) & ELSEWHERE.keys()} == {}


def test_what_is_imported_late_is_in_some_extra_too() -> None:
    asked = requirements("experiments")
    late = {package for name, found in modules().items() if not name.startswith("tests") for package in foreign(found.late)}
    assert {package for package in late if not brought_by(package) & asked} <= ELSEWHERE.keys()


@pytest.mark.parametrize("extra", [BASE, *(name for name in EXTRAS if name != "dev")])
def test_an_extra_asks_for_nothing_in_vain(extra: str) -> None:
    """Without any one of its packages fewer modules of its kind would work, or one that works would fail late."""
    asked = requirements(extra)
    ours = USED_BY.get(extra, "attnstore")
    good = {name for name in promised(asked) if name.partition(".")[0] == ours}
    own = {
        distribution(each) for each in (EXTRAS[extra] if extra else PROJECT["dependencies"]) if not each.startswith("attnstore[")
    }
    for each in sorted(own - FOR_OTHERS.keys()):
        late = {name for name in good if any(each in brought_by(package) for package in foreign(modules()[name].late))}
        assert good - promised(asked - {each}) or late, f"{each} of [{extra}] is imported nowhere"


def test_developers_have_what_the_tests_import() -> None:
    asked = requirements("dev")
    imported = {package for name, found in modules().items() if name.startswith("tests") for package in foreign(found.at_once)}
    assert {package for package in imported if not brought_by(package) & asked} == set()


def test_one_package_is_asked_for_in_one_version() -> None:
    asked: dict[str, set[str]] = {}
    for requirement in [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]:
        if not requirement.startswith("attnstore["):
            asked.setdefault(distribution(requirement), set()).add(requirement)
    assert {name: versions for name, versions in asked.items() if len(versions) > 1} == {}


def test_every_requirement_is_pinned_for_a_release() -> None:
    pinned = {distribution(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"\w", line)}
    for extra in (BASE, *EXTRAS):
        assert requirements(extra) - pinned <= {"attnstore"}, extra
