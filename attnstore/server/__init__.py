"""The store node: a thin gRPC shell around the pure core."""
