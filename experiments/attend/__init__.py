"""Does it pay to move the query and not the cache? Decoding with the KV here, fetched for each step, or attended to at the store.

python -m experiments.attend --json PATH [--quick]
"""
