"""Transports of pages between a client and one node: gRPC, the page channel over TCP, shared memory."""
