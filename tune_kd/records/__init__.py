"""What is on record of a run: its folder, the ledger while it goes on, Parquet tables for everyone else."""
