"""Prefill and decode throughput of this worker compared with vLLM's, on one machine, in one run.

    python -m experiments.throughput --vllm-python PATH [--quick] [--json F]

Both run the same model in the same dtype with as many threads, each in a process of its own that waits while the other works; cases
alternate between them, so that other load on the machine affects both. The prompts, their lengths and the tokens to generate are
the same. Without `--vllm-python` only this worker is measured, and the ratio shown is that of an earlier run, marked as such.
"""
