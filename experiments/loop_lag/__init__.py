"""The lag that each RPC at its largest size adds to a node's event loop: `python -m experiments.loop_lag`."""
