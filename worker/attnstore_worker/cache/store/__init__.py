"""Stores of pages outside the worker's own memory, and their contracts."""
