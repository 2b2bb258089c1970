"""Whether each wait of a device is noticed if it is left out: `python -m experiments.device_faults`."""
