"""Files, object stores, signals, standard streams, the environment, secrets, and the errors that callers handle."""
