"""Prefill and decode throughput of this worker beside vLLM's, on one machine, in one run.

    python -m experiments.throughput --vllm-python PATH [--quick] [--json F]

Both run the same model in the same dtype with as many threads, each in a process of its own that waits while the other works;
cases take turns between them, so that what else happens on the machine meets both. The prompts, their lengths and the tokens to
generate are the same. Without `--vllm-python` only this worker is measured, and the ratio of an earlier run is shown as that.
"""
