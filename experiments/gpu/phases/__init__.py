"""The phases of a run, in order; each module has `run(phase)`."""
