"""The `cpu` device: a recorded program of the native kernels, over packed weights."""
