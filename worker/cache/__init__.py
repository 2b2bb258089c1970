"""The worker's KV memory: block pool, prefix cache and the path to and from the store."""
