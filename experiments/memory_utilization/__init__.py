"""The share of KV memory that holds tokens, and its effect: contiguous reservations against pages, at equal memory.

    python -m experiments.memory_utilization [--quick] [--sweep] [--json F]

The experiment of "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., SOSP 2023,
figures 2 and 12) on this worker: the real model and the same engine with three ways to allocate memory to a sequence. Only the
memory that a sequence needs before it may start differs.

    contiguous_max     the longest sequence there may be, in one piece (the paper's Orca (Max))
    contiguous_known   its final length, in one piece, as if it were known (Orca (Oracle))
    paged              a block at a time (the engine as it is)

Lengths are drawn, because the texts of ShareGPT are not available here: log-normal, 161 tokens in and 338 out on average, as the
paper reports. `--shrink N` divides lengths, their limit and the block by N, so that utilisation stays the same and a run takes less
time.
"""
