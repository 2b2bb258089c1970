"""The contenders: one module each, run as `python -m experiments.bandwidth.lanes.NAME ARGUMENT` in a process of its own."""
