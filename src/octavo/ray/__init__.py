"""Octavo on a Ray cluster: an application for Ray Serve, and operators for Ray Data. See docs/ray.md.

serve.run(octavo.ray.application("demo", engines=2))              # after octavo.ray.start()
octavo.ray.generate(dataset, "demo", max_new_tokens=16)
octavo.ray.embed(dataset, "demo-embed")
"""

try:
    import ray as _ray  # noqa: F401 - only whether it is there
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    raise ModuleNotFoundError('octavo.ray needs Ray: pip install "octavo[ray]"', name="ray") from None

from octavo.ray.application import GRPC_SERVICERS, QueuePolicy, application, build, start
from octavo.ray.data import embed, generate

__all__ = ["GRPC_SERVICERS", "QueuePolicy", "application", "build", "embed", "generate", "start"]
