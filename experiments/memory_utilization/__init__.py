"""How much of the KV memory holds tokens, and what that is worth: contiguous reservations against pages, at equal memory.

    python -m experiments.memory_utilization [--quick] [--sweep] [--json F]

The experiment of "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., SOSP 2023,
figures 2 and 12) on this worker: the real model and the same engine behind three ways to give memory to a sequence. Only what a
sequence must be given before it may start differs.

    contiguous_max     the longest sequence there may be, in one piece (the paper's Orca (Max))
    contiguous_known   its final length, in one piece, as if it were known (Orca (Oracle))
    paged              a block at a time (the engine as it is)

Lengths are drawn, not taken from ShareGPT, whose text is not here: log-normal, 161 tokens in and 338 out on average, as the
paper reports of it. `--shrink N` divides lengths, their limit and the block by N, so that utilisation stays what it is and a run
takes less time.
"""
