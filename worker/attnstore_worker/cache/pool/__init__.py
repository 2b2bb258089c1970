"""The worker's own memory: pools of blocks, block tables and the tiers inside the worker."""
