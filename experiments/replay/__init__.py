"""The hit rate of a cache of a given size on a trace of real prompts, under each eviction policy.

    python -m experiments.replay --trace FILE [--capacity-tokens N|inf] [--policy NAME] [--queue-depth D] [--json F] [--plot F]

    python -m experiments.replay --trace FILE --with-model N [--slowdown S] [--pool B] [--host-pool B] [--node-capacity B]

A trace in Mooncake's format (Qin et al., "Mooncake: trading more storage for less computation", FAST 2025) names every prompt's
blocks of 512 tokens by chained ids, so its requests can be replayed without their text. They go through the worker's own block pool
and policies, one after another in trace order, without model or tensors; the cache logic is the worker's, not a copy. Only the
bound that no policy can exceed is implemented here (`bound`).

With `--with-model` its first N requests run through the engine and the real model, with a store node behind it (`with_model`).
"""
