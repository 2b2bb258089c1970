"""Models of random weights: the same on every device, and whole enough to generate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnstore.core.layout import DType
from attnstore_worker import random_models
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.random_models import LLAMA_3_8B, SMOLLM2_135M, LlamaShape, fill_random, random_model

TINY = LlamaShape("tiny", 2, 64, 128, 4, 2, 32, vocabulary=1000, context_tokens=512, rope_theta=10_000.0, tied=False)


def filled(elements: int, *, seed: int = 0, number: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    target = torch.empty(elements, dtype=dtype)
    fill_random(target, 1.0, 0.5, seed=seed, number=number)
    return target


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return random_model(TINY, DType.FP32)


def test_values_have_the_mean_and_the_deviation() -> None:
    values = filled(100_000)
    assert values.mean().item() == pytest.approx(1.0, abs=0.01)
    assert values.std().item() == pytest.approx(0.5, rel=0.01)
    assert len(values.unique()) > 99_000


def test_values_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled(1000)
    monkeypatch.setattr(random_models, "_FILL_ELEMENTS", 64)
    assert torch.equal(filled(1000), whole)
    assert torch.equal(filled(1000, dtype=torch.bfloat16), whole.bfloat16())


def test_known_values_are_those_of_every_device() -> None:
    expected = [1.1431251764297485, 1.8636207580566406, 1.3132120370864868, 0.8893094062805176]
    assert filled(4, seed=3, number=5).tolist() == expected


@pytest.mark.parametrize("other", [{"seed": 1}, {"number": 1}, {"seed": 1, "number": 1}], ids=str)
def test_another_seed_or_number_gives_unrelated_values(other: dict[str, int]) -> None:
    values = torch.stack((filled(50_000), filled(50_000, **other)))
    assert abs(torch.corrcoef(values)[0, 1].item()) < 0.02
    for shift in (-2, -1, 1, 2):
        moved = torch.stack((values[0], values[1].roll(shift)))
        assert abs(torch.corrcoef(moved)[0, 1].item()) < 0.02


def test_a_random_model_generates_the_same_tokens_again(model: LoadedModel) -> None:
    tokens = []
    for each in (model, random_model(TINY, DType.FP32)):
        with Engine(each, EngineOptions(pool_bytes=1 << 20)) as engine:
            tokens.append(engine.generate(each.tokenizer("a text").input_ids, SamplingParams(max_tokens=12)).generated)
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 2


def test_pages_of_other_seeds_shapes_and_dtypes_are_not_shared(model: LoadedModel) -> None:
    tied = random_model(TINY._replace(tied=True), DType.FP32)
    others = [random_model(TINY, DType.FP32, seed=1), tied, random_model(TINY, DType.BF16)]
    assert len({model.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_every_token_has_a_text_of_its_own(model: LoadedModel) -> None:
    texts = [model.tokenizer.decode([token]) for token in range(256, TINY.vocabulary)]
    assert len(set(texts)) == len(texts)
    assert model.tokenizer.decode(model.tokenizer("a text, ä").input_ids) == "a text, ä"


@pytest.mark.parametrize(("shape", "parameters"), [(SMOLLM2_135M, 134_515_008), (LLAMA_3_8B, 8_030_261_248)], ids=str)
def test_shapes_are_those_of_the_models_they_name(shape: LlamaShape, parameters: int) -> None:
    attended, keys = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * attended + 2 * keys + 3 * shape.intermediate + 2)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    assert shape.layers * layer + embeddings + shape.hidden == parameters
