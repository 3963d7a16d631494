"""Benchmarks: `python -m benchmarks`. Results are ratios of two sides, timed in pairs in the same run."""
