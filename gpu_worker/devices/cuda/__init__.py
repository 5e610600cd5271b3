"""The `cuda` device: Triton kernels and torch's products, over buffers that are allocated once."""
