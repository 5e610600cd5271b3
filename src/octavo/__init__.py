"""Octavo: LLM inference and serving over gRPC.

The folders of the repository appear here under one name: `octavo.services`, `octavo.gpu_worker`,
`octavo.kernels`, and one package for each protobuf package (`octavo.inference.v1`, ...).
"""

__version__ = "0.1.0"
