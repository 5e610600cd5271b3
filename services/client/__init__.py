"""The Python client: `async with Client("127.0.0.1:50051") as client: ...`. Needs neither torch nor numpy."""

from octavo.services.client.batch import BatchResult
from octavo.services.client.client import Client
from octavo.services.client.embeddings import Embeddings, Labelled, Ranked
from octavo.services.client.errors import ClientClosedError, OctavoError, ProtocolError, Violation
from octavo.services.client.request import BatchItem, GenerationOptions
from octavo.services.client.stream import Result, Stream
from octavo.services.client.sync import SyncClient, SyncStream

__all__ = [
    "BatchItem",
    "BatchResult",
    "Client",
    "ClientClosedError",
    "Embeddings",
    "GenerationOptions",
    "Labelled",
    "OctavoError",
    "ProtocolError",
    "Ranked",
    "Result",
    "Stream",
    "SyncClient",
    "SyncStream",
    "Violation",
]
