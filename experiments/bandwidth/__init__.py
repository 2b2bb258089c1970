"""`python -m experiments.bandwidth`: the speed of pages over each transport, compared with the machine's limits and other stores.

Every contender is a *lane*: a client process that moves batches of the same pages, one lane at a time, and its server processes. A
round times every lane once for each operation and batch, so that other load on the machine affects all of them alike; a figure is
the median over rounds, a ratio the median of the rounds' ratios. See docs/performance.md.
"""
