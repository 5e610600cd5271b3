"""Native CPU kernels: C++ behind a plain C interface, compiled once for each instruction set."""
