"""Profiles of links: one table, one notation, and no invalid link."""

from __future__ import annotations

import math

import pytest

from attnstore.errors import InvalidArgument
from attnstore.links import PROFILES, LinkProfile, parse_link


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_every_profile_of_the_table_can_be_spelled_out(profile: LinkProfile) -> None:
    spelled = parse_link(profile.spec)
    assert (spelled.down_bits_per_s, spelled.up_bits_per_s) == (profile.down_bits_per_s, profile.up_bits_per_s)
    assert (spelled.one_way_ms, spelled.jitter_ms) == (profile.one_way_ms, profile.jitter_ms)
    assert parse_link(profile.name) is profile
    assert profile.source


def test_a_link_is_spelled_as_rates_round_trip_and_jitter() -> None:
    link = parse_link("200m/20m@30ms~4ms")
    assert (link.down_bits_per_s, link.up_bits_per_s) == (200e6, 20e6)
    assert (link.one_way_ms, link.rtt_ms, link.jitter_ms) == (15, 30, 4)
    assert link.down_gb_per_s == 0.025


@pytest.mark.parametrize("text", ["", "fast", "10", "10gb", "-1g", "1g@", "1g@5", "1g@-5ms", "1e9g", "nan", "1g@5ms~3", "1g 2g"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is no link"):
        parse_link(text)


@pytest.mark.parametrize(
    ("down", "up", "one_way_ms", "jitter_ms"),
    [
        (0, 1e9, 1, 0),
        (1e9, 0, 1, 0),
        (-1, 1e9, 1, 0),
        (math.nan, 1e9, 1, 0),
        (1e9, math.nan, 1, 0),
        (1e9, 1e9, -1, 0),
        (1e9, 1e9, math.inf, 0),
        (1e9, 1e9, math.nan, 0),
        (1e9, 1e9, 1, -1),
        (1e9, 1e9, 1, 2),
        (1e9, 1e9, 1, math.nan),
    ],
)
def test_a_profile_that_no_link_can_have_is_refused(down: float, up: float, one_way_ms: float, jitter_ms: float) -> None:
    with pytest.raises(InvalidArgument, match="link 'x'"):
        LinkProfile("x", down, up, one_way_ms, jitter_ms)


@pytest.mark.parametrize("text", ["0g", "0.0m@5ms", "1g@2ms~5ms"])
def test_a_spelled_link_is_checked_like_any(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_link(text)
