"""What each RPC at its largest size adds to the lag of a node's event loop: `python -m experiments.loop_lag`."""
