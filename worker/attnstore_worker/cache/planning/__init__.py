"""Predicted costs of loads and attended steps, the decisions from them, and their actual costs."""
