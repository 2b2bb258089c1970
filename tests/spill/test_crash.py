"""The crash simulator: no promise is broken, and a rule that is left out is noticed. `experiments.spill.crash` runs more."""

from __future__ import annotations

import pytest

from experiments.spill.crash import simulate
from experiments.spill.mutations import LYING, MUTATIONS, Mutation

_STATES = 2_000
_LYING_STATES = 500
_MUTANT_STATES = 800


def test_no_loss_of_power_breaks_a_promise() -> None:
    result = simulate(_STATES)
    assert result.states >= _STATES
    assert not result.violations, f"seed {result.first_seed}"


def test_no_wrong_byte_is_read_if_flushes_do_nothing() -> None:
    result = simulate(_LYING_STATES, 0, LYING)
    assert "wrong" not in result.violations, f"seed {result.first_seed}"
    assert result.violations, "a disk that never flushes loses pages; the simulator did not lose power"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_rule_left_out_is_noticed(mutation: Mutation) -> None:
    with mutation.applied():
        result = simulate(_MUTANT_STATES, 0, mutation.disks, until_violation=True)
    assert result.violations
