"""Sweeps on Ray: a grid of cells on one machine or many. `python -m sweep --help`."""
