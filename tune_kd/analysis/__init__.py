"""Effects with intervals and verdicts, audits of early stopping, power, simulation and calibration."""
