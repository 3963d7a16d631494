"""Controlled ablation studies of knowledge distillation: planned, run with Ray Tune, recorded as Parquet."""
