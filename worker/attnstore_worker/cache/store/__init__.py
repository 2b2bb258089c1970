"""Stores of pages outside the worker's own memory, and the contracts that they meet."""
