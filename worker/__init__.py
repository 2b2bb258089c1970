"""The reference worker: an inference engine whose KV pages may live in an AttnStore node.

Data flows one way: `cli -> engine -> (model, cache) -> attnstore`. Only `worker.cache` and `worker.vllm` talk to a store.
"""
