"""Data sets: find, decode and split their images, and draw the augmented views of an epoch."""
