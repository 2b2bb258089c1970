"""The cost of the network as an LLM's memory: first tokens and decode steps over links of many kinds.

    python -m experiments.penalty --json PATH [--quick] [--resume]

A store node, a relay that imitates the link and a worker with a real model are processes of their own. See docs/planner.md.
"""
