"""The `reference` device: plain torch, the oracle of the others."""
