"""Faults on purpose, and an independent check that a run has survived them: `python tests/faults --help`."""
