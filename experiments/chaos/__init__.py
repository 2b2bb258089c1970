"""Faults in a running cluster under load: which invariants hold, and how soon the hit rate recovers."""
