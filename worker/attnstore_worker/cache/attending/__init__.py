"""Blocks that stay in the store and are attended to there."""
