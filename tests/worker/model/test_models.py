"""Every causal language model that transformers registers, in a tiny size: computed as its own module does or refused by name.

The same runs as `python -m experiments.models`, whose table is docs/models.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import transformers

from attnstore.core.layout import DType
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.fingerprint import BOOKKEEPING_FIELDS, config_fields
from attnstore_worker.model import LoadedModel, load_model
from experiments.models.agreement import pages_of
from experiments.models.table import COMPUTED, NOT_TRIED, REFUSED, Row, computed_row, parsed, refused_row
from experiments.models.tiny import NotTiny, names, write_model

PAGE: Final = parsed((Path(__file__).parents[3] / "docs" / "models.md").read_text())
OTHER_BOOKKEEPING: Final[dict[str, Any]] = {
    "_name_or_path": "org/model",
    "_commit_hash": "1" * 40,
    "transformers_version": "4.0.0",
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "use_cache": False,
    "output_hidden_states": True,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "problem_type": "regression",
}
"""A value for each field that differs from its default."""
UNLOADABLE: Final = {"output_attentions": True, "return_dict": False}
"""The worker refuses a model with these, so no page gets a name."""


class Tiny(NamedTuple):
    """One model: its folder and the loader's result; None if it is not tiny."""

    name: str
    folder: Path
    loaded: LoadedModel | ModelUnavailable | None


@pytest.fixture(scope="module", params=names())
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Every model in turn."""
    folder = tmp_path_factory.mktemp("model")
    try:
        write_model(request.param, folder)
    except NotTiny:
        return Tiny(request.param, folder, None)
    try:
        return Tiny(request.param, folder, load_model(folder, DType.FP32))
    except ModelUnavailable as error:
        return Tiny(request.param, folder, error)


def row_of(tried: Tiny) -> Row:
    match tried.loaded:
        case None:
            return Row(tried.name, NOT_TRIED, "")
        case ModelUnavailable() as error:
            return refused_row(tried.name, error, tried.folder)
        case model:
            return computed_row(tried.name, model, tried.folder)


def test_a_model_is_computed_rightly_or_refused_as_the_page_says(tried: Tiny) -> None:
    found, written = row_of(tried), PAGE[tried.name]
    assert found.result == written.result, f"python -m experiments.models --write docs/models.md: {found}"
    if found.result == REFUSED:  # a library's text in parentheses may differ between its versions
        assert found.detail.partition(" (")[0] == written.detail.partition(" (")[0]


def test_the_page_has_every_model_and_no_other() -> None:
    assert PAGE.keys() == set(names())
    assert sum(row.result == COMPUTED for row in PAGE.values()) >= 25


def changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, *value[-1:]] or [1]
        case dict():
            return {**value, "never_heard_of": 1}
        case _:
            return 1


def fields_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the fields of a configuration that are in the fingerprint; None if transformers refuses it."""
    try:
        return config_fields(transformers.AutoConfig.for_model(**config))
    except Exception:
        return None


def with_config(folder: Path, target: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("tried", [row.name for row in PAGE.values() if row.result == COMPUTED], indirect=True)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of fields by their older names
def test_a_field_of_the_configuration_changes_the_fingerprint_or_no_byte(tried: Tiny, tmp_path: Path) -> None:
    assert isinstance(tried.loaded, LoadedModel)
    config = json.loads((tried.folder / "config.json").read_text())
    known = fields_of(config)
    everything = {**tried.loaded.module.config.to_dict(), **config}
    same = {
        name: other
        for name, other in ((name, changed(value)) for name, value in everything.items())
        if name != "model_type" and name not in BOOKKEEPING_FIELDS and fields_of({**config, name: other}) == known
    }
    other = load_model(with_config(tried.folder, tmp_path / "other", {**config, **same, **OTHER_BOOKKEEPING}), DType.FP32)
    assert other.fingerprint == tried.loaded.fingerprint
    assert pages_of(other) == pages_of(tried.loaded)


def test_every_bookkeeping_field_is_changed() -> None:
    assert OTHER_BOOKKEEPING.keys() | UNLOADABLE.keys() == BOOKKEEPING_FIELDS.keys()


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_field_with_which_the_module_answers_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelUnavailable):
        load_model(with_config(folder, tmp_path / "other", {**config, name: UNLOADABLE[name]}))


def test_another_implementation_of_experts_has_another_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model("mixtral", folder)
    config = json.loads((folder / "config.json").read_text())
    eager = with_config(folder, tmp_path / "eager", {**config, "experts_implementation": "eager"})
    assert load_model(eager).fingerprint != load_model(folder).fingerprint
