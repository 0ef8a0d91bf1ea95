"""Arms: what acts on a model, and what compares: interventions, sweeps, searches, resistance, what changed inside."""
