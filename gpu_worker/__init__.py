"""The worker: holds weights and the paged KV cache, and computes the steps that a scheduler plans."""
