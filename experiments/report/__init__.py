"""`python -m experiments.report RESULTS... --out DIR`: results of experiments as one self-contained page, and as PNGs.

See docs/report.md for its content and for the rows that it takes.
"""
