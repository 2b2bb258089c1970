"""The engine: sequences, scheduling, running and sampling."""
