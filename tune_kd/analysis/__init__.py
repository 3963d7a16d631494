"""From records to statements: effects with intervals and verdicts, what early stopping did, power, simulation."""
