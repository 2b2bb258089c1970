"""Measurements and proofs of the disk tier: `python -m experiments.spill` and `python -m experiments.spill.crash`."""
