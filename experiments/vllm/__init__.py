"""Stock vLLM alone and on an Attention store: `python -m experiments.vllm --vllm-python PATH --json PATH`.

`session` runs under the Python that has vLLM and answers requests; `workloads` says what is asked; `runs` starts nodes, links and
sessions and makes rows, and `lmcache` a server of LMCache's to compare with.
"""
