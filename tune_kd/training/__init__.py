"""Train one trial, epoch by epoch: networks, methods, teachers and their cached logits, checkpoints, devices."""
