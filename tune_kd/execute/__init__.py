"""Running a plan: the driver decides and records, workers train; with Ray Tune, or in this process."""
