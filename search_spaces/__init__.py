"""Studies, one a module: `study() -> Study`, and `SCALES` for smaller ones of the same."""
