"""Blocking sockets under the protocols of `attnstore.wire`: the system calls that a node and a client share."""
