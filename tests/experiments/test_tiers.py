"""The experiment on tiers, with a tiny model: its rows show the tier that served, and that the tokens were right."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from attnstore_worker.model import LoadedModel
from experiments.tiers import MODES, Pressure, decode_rows

SERVED_BY = {"unconstrained": "hbm", "hbm_only": None, "host": "host", "remote_tcp": "remote", "shared_in_place": "shared"}


def test_every_mode_is_served_by_its_tier_and_gives_the_same_tokens(tiny: LoadedModel) -> None:
    pressure = Pressure(tiny, 60, 4)
    rows = {mode.name: pressure.row(mode) for mode in MODES if mode.name in SERVED_BY}
    for name, tier in SERVED_BY.items():
        row = rows[name]
        assert row.tokens_equal
        served = {other for other, hits in row.hit_tokens_by_tier.items() if hits}
        assert served - {"hbm"} == {tier} - {"hbm", None}, name
        assert name == "unconstrained" or row.pool_blocks * 4 == row.needed_blocks
    assert rows["unconstrained"].hit_tokens_by_tier["hbm"] == 8 * 48
    assert rows["remote_tcp"].read_bytes_by_tier["remote"] > 0
    assert rows["shared_in_place"].read_bytes_by_tier["shared"] == 0


def test_a_context_in_the_own_pool_is_compared_with_the_same_in_place(tiny: LoadedModel) -> None:
    resident, in_place = decode_rows(tiny, 100, 6, 2)
    assert resident.hit_tokens_by_tier == {"hbm": 96, "host": 0, "shared": 0, "remote": 0}
    assert in_place.hit_tokens_by_tier == {"hbm": 0, "host": 0, "shared": 96, "remote": 0}
    assert resident.tokens_equal
    assert in_place.tokens_equal
    assert resident.ratio == pytest.approx(1.0)
    assert json.loads(json.dumps(asdict(in_place)))["measurement"] == "decode"
