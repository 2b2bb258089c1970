"""The worker's GPU path on a real device: correct first, then measured against ceilings of the same run (`make gpu`).

Each phase runs in a process of its own, because an error of a device ends all work of its process. It has a deadline, and its rows
are in its file as soon as they are known. Nothing here needs a model file or a network: weights are random, with a fixed seed.
"""
