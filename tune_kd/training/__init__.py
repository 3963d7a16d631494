"""Training one trial, epoch by epoch: networks, losses, teachers and their cached logits, checkpoints, devices."""
