"""What the scheduler must know of the model that its workers hold."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.worker.v1 import worker_pb2


@dataclass(frozen=True)
class ModelFacts:
    """What a model makes of a sequence.

    vector_size      elements of a vector; 0 if it makes tokens
    whole_sequences  all tokens of a sequence see each other: it is computed in one step, and has no blocks
    vocab_size       token ids are below this; 0 if it is not known
    """

    task: common_pb2.ModelTask = common_pb2.MODEL_TASK_GENERATE
    vector_size: int = 0
    whole_sequences: bool = False
    vocab_size: int = 0

    @property
    def makes_vectors(self) -> bool:
        """Whether it makes vectors (or scores, which are short ones), and no tokens."""
        return self.vector_size > 0

    @classmethod
    def of(cls, ready: worker_pb2.WorkerReady) -> ModelFacts:
        """Return what a worker says of its model."""
        task = ready.task or common_pb2.MODEL_TASK_GENERATE
        return cls(task, ready.vector_size, ready.whole_sequences, ready.vocab_size)


GENERATOR = ModelFacts()
"""A model that makes tokens."""
