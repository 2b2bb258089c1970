"""Faults in a running cluster under load: what must stay true, and how soon the hit rate is back."""
