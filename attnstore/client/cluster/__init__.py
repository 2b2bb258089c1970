"""The client of a cluster: the calls of one node's client, placed over many nodes."""
