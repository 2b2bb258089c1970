"""Stock vLLM alone and on an Attention store: `python -m experiments.vllm --vllm-python PATH --json PATH`.

`session` runs under the Python that has vLLM and answers requests; `workloads` defines the requests; `runs` starts nodes, links and
sessions and makes rows; `lmcache` starts LMCache's server for comparison.
"""
