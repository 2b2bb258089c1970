"""Seventy seconds of chaos: the cluster of docker-compose.yml, real workers, real clients, faults from a seed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from experiments.chaos.__main__ import told
from experiments.chaos.run import run_chaos
from tests.volumes import seed_models

SEED = 2026
RUN_S = 72.0
"""Contains a killed node, a cut link, a killed directory, and each misbehaving caller."""


@pytest.mark.alone
@pytest.mark.netns
@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_byte_and_no_token_is_wrong_no_call_hangs_and_the_hit_rate_comes_back(tmp_path: Path) -> None:
    seed_models(tmp_path / "models")
    try:
        verdict = run_chaos(SEED, RUN_S, tmp_path, os.environ, print)
    finally:
        shutil.rmtree(tmp_path)
    assert verdict.is_good, told(verdict)
    assert verdict.worker_hit_rate > 0.2, "the workers hardly used the store"
