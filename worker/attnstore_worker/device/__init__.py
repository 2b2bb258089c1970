"""Devices that a worker computes on: their memory, their streams, and copies of pages to and from the host."""
