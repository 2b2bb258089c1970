"""Speculative decoding: the same tokens in fewer steps, greedy or drawn; as many drafts as pay."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attnstore_worker.engine import Engine, EngineOptions, SamplingParams, Sequence
from attnstore_worker.engine.sampler import Sampler, peaks
from attnstore_worker.engine.speculative import DRAFTS_MAX, DraftLength, accepted_tokens, draft
from attnstore_worker.model import LoadedModel


def generate(model: LoadedModel, token_ids: list[int], sampling: SamplingParams, *, speculate: bool) -> tuple[Sequence, int, int]:
    """Returns the sequence, the steps and the accepted drafts of a run in a pool that is large enough."""
    options = EngineOptions(pool_bytes=64 * model.layout(16).page_bytes, chunk_tokens=32, speculate=speculate)
    with Engine(model, options) as engine:
        sequence = engine.generate(token_ids, sampling)
        engine.check()
        return sequence, engine.batching().steps, engine.batching().drafts_accepted


REPEATING = [5, 6, 7, 8, 9, 10, 11, 12] * 6


def test_greedy_tokens_are_equal_and_take_fewer_steps(model: LoadedModel) -> None:
    sampling = SamplingParams(max_tokens=32)
    token_ids = model.tokenizer("red, green, blue, red, green, blue, red, green, blue, red,").input_ids
    plain, plain_steps, _ = generate(model, token_ids, sampling, speculate=False)
    quick, quick_steps, accepted = generate(model, token_ids, sampling, speculate=True)
    assert quick.generated == plain.generated
    assert accepted == plain_steps - quick_steps > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_drawn_tokens_of_a_seed_are_equal_too(tiny: LoadedModel, seed: int, params: dict[str, float]) -> None:
    sampling = SamplingParams(max_tokens=32, temperature=0.7, seed=seed, **params)  # type: ignore[arg-type]
    plain, _, _ = generate(tiny, REPEATING, sampling, speculate=False)
    quick, _, _ = generate(tiny, REPEATING, sampling, speculate=True)
    assert quick.generated == plain.generated


@pytest.mark.usefixtures("each_device")
def test_several_sequences_speculate_together(tiny: LoadedModel) -> None:
    prompts = [REPEATING, [token + 100 for token in REPEATING], list(range(50, 90))]
    sampling = SamplingParams(max_tokens=40)
    with Engine(tiny, EngineOptions(pool_bytes=64 * tiny.layout(16).page_bytes, chunk_tokens=64, speculate=True)) as engine:
        sequences = engine.generate_all(prompts, sampling)
        engine.check()
        for token_ids, sequence in zip(prompts, sequences, strict=True):
            assert sequence.generated == generate(tiny, token_ids, sampling, speculate=False)[0].generated


@pytest.mark.usefixtures("each_device")
def test_a_stop_token_among_accepted_guesses_ends_the_sequence_there(tiny: LoadedModel) -> None:
    plain, _, _ = generate(tiny, REPEATING, SamplingParams(max_tokens=40), speculate=False)
    stop = plain.generated[20]
    sampling = SamplingParams(max_tokens=40, stop_token_ids=frozenset({stop}))
    expected, _, _ = generate(tiny, REPEATING, sampling, speculate=False)
    assert generate(tiny, REPEATING, sampling, speculate=True)[0].generated == expected.generated


@pytest.mark.usefixtures("each_device")
def test_guesses_never_pass_max_tokens_or_the_pool(tiny: LoadedModel) -> None:
    for tokens in range(1, 12):
        sequence, _, _ = generate(tiny, REPEATING, SamplingParams(max_tokens=tokens), speculate=True)
        assert len(sequence.generated) == tokens
    small = EngineOptions(pool_bytes=4 * tiny.layout(16).page_bytes, chunk_tokens=32, speculate=True)
    with Engine(tiny, small) as engine:
        sequence = engine.generate(REPEATING, SamplingParams(max_tokens=64))
        engine.check()
    with Engine(tiny, EngineOptions(pool_bytes=small.pool_bytes, chunk_tokens=32)) as engine:
        assert sequence.token_ids == engine.generate(REPEATING, SamplingParams(max_tokens=64)).token_ids


@pytest.mark.parametrize("guess", [0, 1, 3])
def test_what_is_drawn_has_the_distribution_of_the_model_whatever_was_guessed(guess: int) -> None:
    """A chi-squared test of 20,000 draws with fixed seeds against the model's own probabilities."""
    logits = torch.tensor([[1.0, 0.2, -0.5, 0.7], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.softmax(logits[0], dim=-1)
    highest = peaks(logits)
    draws = 20_000
    first: Counter[int] = Counter()
    accepted = 0
    sampler = Sampler(SamplingParams(temperature=1.0, seed=guess))
    for _ in range(draws):
        tokens = accepted_tokens(sampler, [guess], logits.unbind(), highest)
        first[tokens[0]] += 1
        accepted += len(tokens) == 2
    chi_squared = sum((first[token] - draws * float(p)) ** 2 / (draws * float(p)) for token, p in enumerate(expected))
    assert chi_squared < 16.27, "the 99.9% quantile of chi-squared with 3 degrees of freedom"
    assert abs(accepted / draws - float(expected[guess])) < 0.015, "a guess is accepted as often as the model would say it"


def test_verification_ends_with_the_first_token_that_is_not_the_guess() -> None:
    logits = torch.full((4, 9), -10.0)
    for row, token in enumerate([3, 4, 5, 6]):
        logits[row, token] = 10.0
    greedy = Sampler(SamplingParams())
    rows, highest = logits.unbind(), peaks(logits)
    assert accepted_tokens(greedy, [3, 4, 5], rows, highest) == [3, 4, 5, 6]
    assert accepted_tokens(greedy, [3, 8, 5], rows, highest) == [3, 4]
    assert accepted_tokens(greedy, [8, 4, 5], rows, highest) == [3]
    assert accepted_tokens(greedy, [], rows[:1], highest[:1]) == [3]


def test_the_longest_and_latest_repetition_is_followed() -> None:
    assert draft([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2) == (4, 9), "three tokens repeat there, two later on"
    assert draft([1, 2, 7, 1, 2, 8, 1, 2], 2) == (8, 1), "of equal ones the latest"
    assert draft([4, 4, 4, 4], 8) == (4,)
    assert draft([], 4) == ()
    assert draft([1], 4) == ()


def observed(acceptance: float, base_ms: float, each_ms: float) -> DraftLength:
    length = DraftLength()
    generator = torch.Generator().manual_seed(3)
    for step in range(400):
        drafts = (0, 2, 4, 8)[step % 4]
        accepted = 0
        while accepted < drafts and float(torch.rand(1, generator=generator)) < acceptance:
            accepted += 1
        length.observe(drafts, accepted, base_ms + each_ms * drafts)
    return length


def test_more_is_guessed_the_surer_the_guesses_and_the_slower_the_network() -> None:
    assert observed(0.9, 100.0, 1.0).best() > observed(0.9, 10.0, 5.0).best()
    assert observed(0.9, 30.0, 2.0).best() > observed(0.3, 30.0, 2.0).best()
    assert observed(0.97, 1000.0, 0.1).best() == DRAFTS_MAX
    assert observed(0.02, 10.0, 10.0).best() == 0


def test_the_acceptance_is_estimated_from_what_was_seen() -> None:
    assert observed(0.8, 10.0, 1.0).acceptance == pytest.approx(0.8, abs=0.15)
