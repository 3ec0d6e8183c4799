"""The fit that needs no tuning: a chain of stages, each measured, as many as the posterior needs."""
