"""Measurements: users of the public API only; run from a checkout, never shipped."""
