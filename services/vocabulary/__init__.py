"""What a model's tokens are, by its files: for gateways and workers, which must agree. Needs no other package."""
