"""A deterministic simulation: the real scheduler among simulated workers, gateways and networks."""
