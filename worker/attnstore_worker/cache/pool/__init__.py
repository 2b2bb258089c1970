"""The blocks of the worker's own memory: pools, tables and the tiers inside the worker."""
