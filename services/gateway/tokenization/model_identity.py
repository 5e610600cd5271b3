"""Whether a scheduler's workers have the model of this gateway: its token ids mean nothing to another one."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.scheduler.v1 import scheduler_pb2


@dataclass(frozen=True)
class ModelIdentity:
    """What this gateway knows of its model; what is 0 or empty is not compared.

    tokenizer_sha256  as WorkerReady.tokenizer_sha256
    model_version     of the weights, as WorkerHello.model_version
    """

    vocab_size: int = 0
    tokenizer_sha256: str = ""
    model_version: str = ""

    def mismatch(self, load: scheduler_pb2.Load) -> str:
        """Return why a scheduler's workers are not for this gateway, or nothing.

        Of a scheduler that has had no worker yet nothing is known, so nothing is wrong with it.
        """
        if self.model_version and load.model_version and load.model_version != self.model_version:
            return f"its workers have model version {load.model_version}, this gateway is for {self.model_version}"
        own, theirs = self.tokenizer_sha256, load.tokenizer_sha256
        if own and theirs and _kind(own) == _kind(theirs):
            if own != theirs:
                return f"its workers have a model with the tokenizer {theirs}, this gateway's is {own}"
        elif self.vocab_size and load.vocab_size and load.vocab_size != self.vocab_size:
            return f"its workers have a model with {load.vocab_size} token ids, this gateway's has {self.vocab_size}"
        return ""


def _kind(tokenizer: str) -> str:
    return tokenizer.partition(":")[0]
