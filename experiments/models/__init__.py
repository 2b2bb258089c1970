"""Every causal language model that transformers registers, in a tiny size: does the worker compute it as its own module does?

`python -m experiments.models --help`; the table is docs/models.md.
"""
