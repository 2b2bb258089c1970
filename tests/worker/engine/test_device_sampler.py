"""Drawing tokens on a device: against an fp64 reference with the same random numbers, and by its frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from attnstore_worker.engine.device_sampler import NOT_FINITE, draw, uniforms
from attnstore_worker.engine.step_tables import Inputs

EMPTY = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class How:
    """The parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    at: int = 0


def inputs_of(rows: list[How]) -> Inputs:
    return Inputs(
        *(EMPTY,) * 7,
        rows=torch.arange(len(rows)),
        temperatures=torch.tensor([how.temperature for how in rows], dtype=torch.float64),
        top_ps=torch.tensor([how.top_p for how in rows], dtype=torch.float64),
        top_ks=torch.tensor([how.top_k for how in rows]),
        seeds=torch.tensor([how.seed for how in rows]),
        drawn_at=torch.tensor([how.at for how in rows]),
    )


def drawn(logits: Tensor, rows: list[How]) -> list[int]:
    tokens: list[int] = draw(logits, inputs_of(rows), greedy=False).tolist()
    return tokens


def expected(row: list[float], how: How, uniform: float) -> set[int]:
    """Returns the tokens that may be drawn: the one of the exact distribution, and its neighbours at a border of 1e-6."""
    highest = max(row)
    if how.temperature == 0.0:
        return {row.index(highest)}
    order = sorted(range(len(row)), key=lambda token: -row[token])[: how.top_k or len(row)]
    weights = [math.exp((row[token] - highest) / how.temperature) for token in order]
    total, before, kept = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if before < how.top_p * total:
            kept.append((token, weight))
        before += weight
    mass, before, allowed = sum(weight for _, weight in kept), 0.0, set()
    for token, weight in kept:
        if before - 1e-6 * mass <= uniform * mass <= before + weight + 1e-6 * mass:
            allowed.add(token)
        before += weight
    return allowed


HOWS = st.builds(
    How,
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.integers(0, (1 << 63) - 1),
    st.integers(0, 1 << 20),
)
LOGITS = st.lists(st.integers(-72, 72), min_size=4, max_size=12, unique=True).map(lambda eighths: [each / 8 for each in eighths])


@given(row=LOGITS, hows=st.lists(HOWS, min_size=1, max_size=5))
def test_a_token_is_the_one_of_the_exact_distribution_at_its_random_number(row: list[float], hows: list[How]) -> None:
    logits = torch.tensor([row] * len(hows))
    numbers = uniforms(torch.tensor([how.seed for how in hows]), torch.tensor([how.at for how in hows])).tolist()
    for token, how, number in zip(drawn(logits, hows), hows, numbers, strict=True):
        assert token in expected(logits[0].tolist(), how, number)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    hows = [How(0.9, seed=row, at=7 + row, top_p=0.95) for row in range(6)]
    whole = drawn(logits, hows)
    assert [drawn(logits[row : row + 1], [hows[row]])[0] for row in range(6)] == whole
    assert drawn(logits.flip(0), hows[::-1]) == whole[::-1]


def test_frequencies_are_the_probabilities() -> None:
    """4,000 draws of five tokens; the largest deviation from the expected count is below four standard deviations."""
    count = 4_000
    row = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    tokens = drawn(row.expand(count, -1), [How(seed=5, at=number) for number in range(count)])
    for token, probability in enumerate(row.softmax(0).tolist()):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(tokens.count(token) - count * probability) < 4 * deviation


def test_random_numbers_are_uniform_and_differ_by_seed_and_by_position() -> None:
    seeds, positions = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    numbers = uniforms(seeds.flatten(), positions.flatten())
    assert len(set(numbers.tolist())) == 64 * 64
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    tenths = torch.histc(numbers.float(), 10, 0, 1)
    assert float((tenths - 409.6).abs().max()) < 4 * math.sqrt(4096 * 0.09)


@dataclass(frozen=True)
class Spoilt:
    """What a row's logits become, and whether a token can be drawn from them."""

    values: dict[int, float]
    is_finite: bool
    rest: float | None = None
    allowed: set[int] = field(default_factory=set)


SPOILT = {
    "a NaN": Spoilt({2: math.nan}, False),
    "an infinity": Spoilt({1: math.inf}, False),
    "nothing but negative infinities": Spoilt({}, False, rest=-math.inf),
    "some negative infinities": Spoilt({0: -math.inf, 3: -math.inf}, True, allowed={1, 2, 4}),
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=list(SPOILT))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_largest_finite_logit_gives_no_token_and_disturbs_no_other(spoilt: Spoilt, temperature: float) -> None:
    logits = torch.tensor([[0.5, 1.0, 0.0, 0.2, 0.1]] * 2)
    expected_beside = drawn(logits[1:], [How(temperature, seed=1)])[0]
    if spoilt.rest is not None:
        logits[0] = spoilt.rest
    for token, value in spoilt.values.items():
        logits[0, token] = value
    got, beside = drawn(logits, [How(temperature), How(temperature, seed=1)])
    assert beside == expected_beside
    assert (got in spoilt.allowed) if spoilt.is_finite else got == NOT_FINITE


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert draw(logits, inputs_of([How(0.0), How(0.0)]), greedy=True).tolist() == [1, 0]
    assert drawn(logits, [How(0.0), How(0.0)]) == [1, 0]


def test_a_tiny_temperature_is_greedy() -> None:
    assert drawn(torch.tensor([[1.0, 1.5, 0.0]]), [How(5e-324)]) == [1]
