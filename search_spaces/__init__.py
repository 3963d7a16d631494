"""Studies, one per module: `study() -> Study`, and `SCALES` for smaller versions of it."""
