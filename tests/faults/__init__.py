"""Fault injection, and an independent check that a run survives it: `python tests/faults --help`."""
