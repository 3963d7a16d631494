"""What stands on the operating system: files, stores, signals, the environment, and the errors that they raise."""
