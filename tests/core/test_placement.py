"""Placement: balanced, stable, weighted, and the same for every caller."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore.core.placement import Placement

KEYS = [hashlib.blake2b(number.to_bytes(4, "little"), digest_size=7).digest() for number in range(100_000)]
NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=8, unique=True)
SOME_KEYS = st.lists(st.binary(min_size=7, max_size=7), min_size=1, max_size=50)


def cluster(nodes: int) -> Placement:
    return Placement({f"store-{number}.example:7400": 1.0 for number in range(nodes)})


def first_owners(placement: Placement) -> Counter[str]:
    return Counter(placement.ranked(key)[0] for key in KEYS)


@pytest.mark.parametrize("nodes", [3, 5, 8, 16, 50])
def test_a_hundred_thousand_keys_are_balanced_within_five_percent(nodes: int) -> None:
    owned = first_owners(cluster(nodes))
    fair = len(KEYS) / nodes
    spread = math.sqrt(sum((count - fair) ** 2 for count in owned.values()) / nodes) / fair
    assert len(owned) == nodes
    assert spread <= 0.05
    # Keys are random, so no placement that does not count them is better than fair draws: four standard deviations of those.
    worst = max(abs(count - fair) for count in owned.values()) / fair
    assert worst <= max(0.05, 4 / math.sqrt(fair))


def test_a_node_owns_in_proportion_to_its_weight() -> None:
    weights = {"small": 1.0, "middle": 2.0, "large": 5.0}
    owned = first_owners(Placement(weights))
    for name, weight in weights.items():
        assert owned[name] / len(KEYS) == pytest.approx(weight / 8, rel=0.05)


@given(names=NAMES, keys=SOME_KEYS)
def test_when_a_node_joins_a_key_keeps_its_owner_or_moves_to_it(names: list[str], keys: list[bytes]) -> None:
    before, after = Placement(dict.fromkeys(names[1:], 1.0)), Placement(dict.fromkeys(names, 1.0))
    for key in keys:
        assert after.ranked(key)[0] in (before.ranked(key)[0], names[0])


@given(names=NAMES, keys=SOME_KEYS, weights=st.lists(st.floats(0.01, 100), min_size=8, max_size=8))
def test_a_node_that_leaves_changes_the_order_of_no_others(names: list[str], keys: list[bytes], weights: list[float]) -> None:
    everyone = dict(zip(names, weights, strict=False))
    left = {name: weight for name, weight in everyone.items() if name != names[0]}
    for key in keys:
        assert [name for name in Placement(everyone).ranked(key) if name != names[0]] == Placement(left).ranked(key)


@pytest.mark.parametrize("nodes", [3, 10])
def test_joining_moves_one_nth_of_the_keys(nodes: int) -> None:
    before, after = cluster(nodes), cluster(nodes + 1)
    moved = sum(before.ranked(key)[0] != after.ranked(key)[0] for key in KEYS[:20_000])
    assert moved / 20_000 == pytest.approx(1 / (nodes + 1), rel=0.1)


@given(names=NAMES, keys=SOME_KEYS, order=st.randoms())
@settings(max_examples=25)
def test_the_order_in_which_nodes_are_known_does_not_matter(names: list[str], keys: list[bytes], order: object) -> None:
    shuffled = list(names)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for key in keys:
        ranked = Placement(dict.fromkeys(names, 1.0)).ranked(key)
        assert ranked == Placement(dict.fromkeys(shuffled, 1.0)).ranked(key)
        assert sorted(ranked) == sorted(names)


def test_placement_is_the_same_in_every_process_and_version() -> None:
    # A change of these would move every page of every running cluster.
    placement = Placement({"a": 1.0, "b": 2.0, "c": 0.5})
    pinned = [["c", "b", "a"], ["c", "b", "a"], ["b", "a", "c"], ["a", "b", "c"]]
    assert [placement.ranked(bytes([number] * 7)) for number in range(4)] == pinned
