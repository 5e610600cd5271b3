"""What a worker process can be told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of a worker."""

    model: str = field(
        default="",
        metadata={"help": "the model: a folder in Hugging Face layout, or a .gguf file", "metavar": "PATH"},
    )
    device: str = field(
        default="auto",
        metadata={"help": "what computes; auto: the best there is", "choices": ("auto", "cuda", "cpu", "reference")},
    )
    worker_endpoint: str = field(
        default="tcp://127.0.0.1:50053",
        metadata={"help": "the scheduler's ZeroMQ endpoint for workers: ipc://PATH or tcp://HOST:PORT"},
    )
    worker_id: str = field(default="", metadata={"help": "this worker's name, unique; empty: generated"})
    group_id: str = field(default="", metadata={"help": "the copy of the model it belongs to; empty: its own"})
    kv_cache_memory: int = field(
        default=0,
        metadata={
            "help": "memory for the KV cache, for example 2GiB; 0: 512MiB on a CPU, all that is left on a GPU",
            "kind": "bytes",
            "metavar": "BYTES",
        },
    )
    max_model_len: int = field(
        default=0, metadata={"help": "longest context in tokens; 0: all that the model was made for"}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "type that weights are converted to; auto: as stored",
            "choices": ("auto", "bfloat16", "float16", "float32"),
        },
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata={"help": "type of the KV cache on a GPU; auto: that of the weights", "choices": ("auto", "fp8")},
    )
    num_threads: int = field(default=0, metadata={"help": "threads that compute; 0: one for each core"})
    log_level: str = field(
        default="info", metadata={"help": "how much to log", "choices": ("debug", "info", "warning", "error")}
    )
    progress_fd: int = field(
        default=-1,
        metadata={"help": "file descriptor that progress is written to, as JSON lines; -1: none", "hidden": True},
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must be given: a folder in Hugging Face layout, or a .gguf file")
        for name in ("kv_cache_memory", "max_model_len", "num_threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
