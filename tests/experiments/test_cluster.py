"""The cluster experiment runs over real links and reports what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnstore.core.hashing import segment_key
from attnstore.core.placement import Placement
from experiments.cluster import Bandwidth, DirectoryCost, balanced, table

COST = DirectoryCost(3, 4, 1.0, 1.0, 9000.0, 700.0)


def test_every_node_owns_as_many_of_the_segments_that_are_read() -> None:
    nodes = ["a:1", "b:2", "c:3"]
    placement = Placement(dict.fromkeys(nodes, 1.0))
    owners = [placement.ranked(segment_key(chain[0]))[0] for chain in balanced(nodes)]
    assert {owners.count(node) for node in nodes} == {len(owners) // 3}


@pytest.mark.parametrize(("gb_per_s", "verdict"), [(0.33, "met"), (0.2, "MISSED")])
def test_scaling_is_judged_against_one_node(gb_per_s: float, verdict: str) -> None:
    shown = table([Bandwidth(1, 4, 1.0, 0.12, 0.96), Bandwidth(3, 4, 1.0, gb_per_s, 0.9)], COST)
    assert verdict in shown.splitlines()[3]


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.redis
def test_a_small_run_measures_both_clusters_and_the_directory(tmp_path: Path) -> None:
    figures = tmp_path / "cluster.json"
    arguments = ["--nodes", "1", "2", "--clients", "1", "--seconds", "2", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cluster", *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())
    assert [cell["nodes"] for cell in measured["bandwidth"]] == [1, 2]
    # No link carries more than its rate, except for the initial burst of its token bucket.
    assert all(0 < cell["share"] < 1.05 for cell in measured["bandwidth"])
    # The cost does not depend on the speed of the machine: a slow machine sends fewer requests.
    assert 0 < measured["directory"]["operations_per_s_node"] < 1.6
