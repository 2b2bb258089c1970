"""The reference worker: an inference engine whose KV pages may be stored in an AttnStore node.

Imports go one way: `cli -> serve -> engine -> model -> cache -> attnstore`. Only `cache` and `vllm` import a store client.
"""
