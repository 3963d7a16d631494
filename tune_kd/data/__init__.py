"""Data sets: where their images are, how they are split, and the views of them that a student sees."""
