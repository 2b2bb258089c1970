"""`python -m experiments.report RESULTS... --out DIR`: results of experiments as one page that needs nothing else, and as PNGs.

See docs/report.md for what it shows and for the rows that it takes.
"""
