"""Records of a run: its folder, the SQLite ledger that the driver writes, and the Parquet tables for everyone else."""
