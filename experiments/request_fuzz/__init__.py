"""Invalid requests of all kinds for a worker's HTTP endpoint.

    python -m experiments.request_fuzz [--requests N] [--seed N]

Owns: `generator` (the requests, from a seed) and `run` (a worker on a tiny random model that answers them). Every answer must say
in one line what is wrong, no answer may be a 5xx, the worker may print no traceback, and a valid request beside each batch must be
answered as before.
"""
