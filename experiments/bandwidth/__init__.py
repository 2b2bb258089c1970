"""`python -m experiments.bandwidth`: how fast pages move over each transport, beside the machine's limits and other stores.

Every contender is a *lane*: a client process that moves batches of the same pages, one lane at a time, and the server processes
that it talks to. A round times every lane once for each operation and batch, so that whatever else the machine does hits all of
them alike; a figure is the median over rounds, a ratio the median of the rounds' ratios. See docs/performance.md.
"""
