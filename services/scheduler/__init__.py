"""The scheduler process owns the rules and every block of KV cache. It knows no torch, no tensors and no text."""
