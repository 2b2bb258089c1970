"""Test doubles that ship with the product: the fakes behind its own seams."""

from attnstore.testing.clock import ManualClock

__all__ = ["ManualClock"]
