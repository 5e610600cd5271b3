"""Octavo: LLM inference and serving over gRPC.

The folders of the repository appear here under one name: `octavo.services`, `octavo.gpu_worker`,
`octavo.kernels`, and one package for each protobuf package (`octavo.inference.v1`, ...).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.services.client import Client, ClientClosedError, OctavoError, SyncClient
    from octavo.services.offline.llm import LLM

__all__ = ["LLM", "Client", "ClientClosedError", "OctavoError", "SyncClient", "__version__"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """Return what is imported when it is first asked for, too: for completion and help()."""
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})


def __getattr__(name: str) -> object:
    """Import the client when it is first asked for: it needs gRPC, which `octavo --help` does not."""
    if name in ("Client", "ClientClosedError", "OctavoError", "SyncClient"):
        from octavo.services import client

        return getattr(client, name)
    if name == "LLM":
        from octavo.services.offline.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
