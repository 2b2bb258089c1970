"""The reference worker: an inference engine whose KV pages may be stored in an AttnStore node.

Imports go one way: `cli -> engine -> (model, cache) -> attnstore`. Only `cache`, `vllm` and the commands open a store client.
"""
