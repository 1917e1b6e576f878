"""jattn beside its peers, in one process: answers checked first, then times, rates and memory. `python -m bench`."""
