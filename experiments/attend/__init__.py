"""Does moving the query instead of the cache pay? Decoding with KV in the worker, fetched for each step, or attended to at the
store.

python -m experiments.attend --json PATH [--quick]
python -m experiments.attend --trace PATH
python -m experiments.attend --predicate PATH
"""
