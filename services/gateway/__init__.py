"""The gateway: tokenizes, validates, detokenizes, and speaks the public API. Keeps nothing after a call."""
