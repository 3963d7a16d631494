"""Distillation methods that come with tune_kd, a file each: its declaration, `METHOD`, and its loss."""
