"""The calculator reproduces published figures, and its formulas hold at their limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from attnstore.errors import InvalidArgument
from attnstore.links import PROFILES, parse_link
from attnstore.whatif import GPUS, Question, answer, load_model

_BASE = Question(load_model("llama-3-8b"), GPUS["h100"], parse_link("100g"), context_tokens=32_768, hit=0.9)


@pytest.mark.parametrize("model", ["llama-2-70b", "llama-3-70b"])
@pytest.mark.parametrize(("gpu", "published_gb_per_s"), [("a800", 6.0), ("h800", 19.0)])
def test_the_break_even_bandwidth_that_mooncake_published_is_reproduced(model: str, gpu: str, published_gb_per_s: float) -> None:
    """Qin et al., "Mooncake", FAST '25: a prefix of 8,192 tokens, eight GPUs at their peak."""
    question = replace(_BASE, model=load_model(model), gpu=GPUS[gpu], gpus=8, context_tokens=8_193, hit=1.0)
    plan = answer(question)
    assert plan.hit_tokens == 8_192
    assert plan.break_even_gb_per_s == pytest.approx(published_gb_per_s, rel=0.1)


def test_hbm_is_270_to_640_times_as_fast_as_a_100_gbit_link() -> None:
    assert answer(_BASE).hbm_to_link == pytest.approx(270, rel=0.01)
    assert answer(replace(_BASE, gpu=GPUS["b200"])).hbm_to_link == pytest.approx(640, rel=0.01)


def test_at_the_break_even_bandwidth_fetching_takes_as_long_as_computing() -> None:
    question = replace(_BASE, link=parse_link("100g@2ms"))
    bandwidth = answer(question).break_even_gb_per_s
    even = replace(question.link, down_bits_per_s=bandwidth * 8e9)
    plan = answer(replace(question, link=even))
    assert plan.prefix_fetch_ms == pytest.approx(plan.prefix_recompute_ms)


@pytest.mark.parametrize("link", PROFILES)
@pytest.mark.parametrize("hit", [0.0, 0.5, 1.0])
def test_computing_the_front_while_fetching_the_back_is_never_slower_than_either(link: str, hit: float) -> None:
    first = answer(replace(_BASE, link=PROFILES[link], hit=hit)).first_token
    assert first.both_ms <= min(first.recompute_ms, first.fetch_ms) * (1 + 1e-9)


def test_computing_and_fetching_meet_where_no_other_block_is_better() -> None:
    question = replace(_BASE, context_tokens=2_000, link=parse_link("20g@1ms"))
    plan = answer(question)
    tail_ms = plan.first_token.fetch_ms - plan.prefix_fetch_ms

    def elapsed_ms(computed: int) -> float:
        # Both halves as plans of their own: only the front computed, only the back fetched.
        part = replace(question, context_tokens=max(1, computed), hit=0.0)
        computing = answer(part).first_token.recompute_ms if computed else 0.0
        left = (plan.hit_tokens - computed) * plan.kv_token_bytes
        fetching = 2 * question.link.rtt_ms + left * 8 / question.link.down_bits_per_s * 1000 if left else 0.0
        return max(computing, fetching) + tail_ms

    best = min(elapsed_ms(computed) for computed in range(0, plan.hit_tokens + 1, question.block_tokens))
    assert plan.first_token.both_ms == pytest.approx(best, rel=1e-6)


def test_a_link_of_no_length_and_no_limit_fetches_in_no_time() -> None:
    plan = answer(replace(_BASE, link=PROFILES["loopback"]))
    assert plan.prefix_fetch_ms == 0
    assert plan.hbm_to_link == 0
    assert plan.first_token.best == "fetch"


def test_nothing_hits_and_nothing_is_fetched() -> None:
    first = answer(replace(_BASE, hit=0.0)).first_token
    assert first.recompute_ms == first.fetch_ms == first.both_ms
    assert first.best == "recompute"


def test_round_trips_that_take_longer_than_computing_have_no_break_even() -> None:
    assert answer(replace(_BASE, link=parse_link("inf@60000ms"))).break_even_gb_per_s == math.inf


def test_the_last_token_is_always_computed() -> None:
    assert answer(replace(_BASE, context_tokens=32, hit=1.0)).hit_tokens == 16
    assert answer(replace(_BASE, context_tokens=33, hit=1.0)).hit_tokens == 32
    assert answer(replace(_BASE, context_tokens=1, hit=1.0)).hit_tokens == 0


def test_attending_in_place_moves_the_same_bytes_whatever_the_context() -> None:
    short, long = (answer(replace(_BASE, context_tokens=tokens)).decode for tokens in (1_000, 1_000_000))
    assert short.attend_bytes == long.attend_bytes == 32 * (32 * 128 * 2 + 32 * 129 * 4)


def test_kv_in_hbm_is_read_faster_than_any_link_brings_it() -> None:
    for link in PROFILES.values():
        decode = answer(replace(_BASE, link=link)).decode
        assert decode.weights_ms < decode.hbm_ms <= decode.fetched_ms


def test_several_gpus_compute_as_much_faster() -> None:
    one, eight = answer(_BASE), answer(replace(_BASE, gpus=8))
    assert eight.first_token.recompute_ms == pytest.approx(one.first_token.recompute_ms / 8)
    assert eight.break_even_gb_per_s > one.break_even_gb_per_s * 7.9


def test_prefill_is_no_faster_than_reading_the_weights() -> None:
    plan = answer(replace(_BASE, context_tokens=2, hit=0.0))
    assert plan.first_token.recompute_ms == pytest.approx(plan.decode.weights_ms)


@pytest.mark.parametrize(
    "change",
    [
        {"context_tokens": 0},
        {"context_tokens": 10**12},
        {"hit": -0.1},
        {"hit": 1.1},
        {"hit": math.nan},
        {"mfu": 0.0},
        {"mfu": 1.5},
        {"gpus": 0},
        {"node_gb_per_s": 0.0},
        {"node_gb_per_s": math.inf},
        {"block_tokens": 0},
    ],
    ids=str,
)
def test_a_question_without_sense_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(change)).removesuffix("_tokens").split("_")[0]):
        replace(_BASE, **change)  # type: ignore[arg-type]
