"""Measurements that anyone can start: `python -m benchmarks`. Ratios of two sides, timed in pairs in the same run."""
