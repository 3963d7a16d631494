"""What breaks a run on purpose, and what judges whether it held."""
