"""The scheduler process: the rules and every block of KV cache. No torch, no tensors, no text."""
