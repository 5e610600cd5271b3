"""What a worker process can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from octavo.gpu_worker import quantization
from octavo.services.telemetry.config import TelemetryConfig

MAX_RANKS = 64
HOST_KV_MEMORY = 512 << 20  # where nothing else is asked for: other processes want memory too
MAX_SPECULATIVE_TOKENS = 15
MAX_ADAPTERS = 4096


@dataclass(frozen=True)
class WorkerConfig(TelemetryConfig):
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
    curve_key: str = field(
        default="",
        metadata={
            "help": "file with this worker's secret key, made by `octavo keys curve`: encrypts the hop (CurveZMQ)",
            "metavar": "PATH",
        },
    )
    curve_server_key: str = field(
        default="", metadata={"help": "file with the scheduler's public key", "metavar": "PATH"}
    )
    worker_id: str = field(default="", metadata={"help": "this worker's name, unique; empty: generated"})
    group_id: str = field(default="", metadata={"help": "the copy of the model it belongs to; empty: its own"})
    rank: int = field(default=0, metadata={"help": "its number among the processes that hold one copy of the model"})
    world_size: int = field(
        default=1, metadata={"help": "how many processes hold one copy of the model together (tensor parallelism)"}
    )
    local_ranks: int = field(
        default=1,
        metadata={
            "help": "how many of these processes `octavo worker` starts on this machine, each with a GPU of its own; "
            "they live and end together"
        },
    )
    node_rank: int = field(
        default=0, metadata={"help": "with local_ranks: the number of this machine among those of the world"}
    )
    rendezvous: str = field(
        default="tcp://127.0.0.1:29500",
        metadata={
            "help": "where rank 0 listens for the other ranks, and they find it: ipc://PATH in a folder that only this "
            "user can enter, or tcp://ADDRESS:PORT with an address of rank 0's machine"
        },
    )
    rank_timeout_s: float = field(
        default=30.0, metadata={"help": "a rank that the others wait for longer ends the group"}
    )
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
    quantization: str = field(
        default="none",
        metadata={
            "help": "quantise the weights of linear layers while they are loaded; none: keep them as they are",
            "choices": quantization.QUANTIZATIONS,
        },
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata={"help": "type of the KV cache on a GPU; auto: that of the weights", "choices": ("auto", "fp8")},
    )
    packed_cache: bool = field(
        default=True,
        metadata={"help": "keep weights on disk as the CPU kernels read them, so that the next start needs no packing"},
    )
    packed_cache_dir: str = field(
        default="",
        metadata={
            "help": "where to keep them, a folder that no other user may write to; empty: octavo/packed in the user's "
            "cache folder"
        },
    )
    packed_cache_limit: int = field(
        default=8 << 30,
        metadata={"help": "most space that they may take; the oldest go first", "kind": "bytes", "metavar": "BYTES"},
    )
    speculative_tokens: int = field(
        default=11,
        metadata={
            "help": "most tokens of a sequence that are guessed from what it repeats or its grammar forces, and "
            "computed in one step, on CPUs and where that pays; 0: none. What is generated stays the same"
        },
    )
    max_adapters: int = field(
        default=64, metadata={"help": "most LoRA adapters that are in memory at once; 0: no request may have one"}
    )
    adapter_memory: int = field(
        default=1 << 30,
        metadata={"help": "most memory that adapters take together", "kind": "bytes", "metavar": "BYTES"},
    )
    num_threads: int = field(default=0, metadata={"help": "threads that compute; 0: one for each core"})
    log_level: str = field(
        default="info", metadata={"help": "how much to log", "choices": ("debug", "info", "warning", "error")}
    )
    drain_s: float = field(
        default=0.0,
        metadata={
            "help": "how long a worker that is told to stop goes on for a scheduler that may still drain: for pods, "
            "where all containers are told at once; 0: it stops at once"
        },
    )
    alive_file: str = field(
        default="",
        metadata={
            "help": "a file that is touched every second once the model is loaded, for `octavo health --alive-file`",
            "metavar": "PATH",
        },
    )
    progress_fd: int = field(
        default=-1,
        metadata={"help": "file descriptor that progress is written to, as JSON lines; -1: none", "hidden": True},
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must be given: a folder in Hugging Face layout, or a .gguf file")
        if not 1 <= self.world_size <= MAX_RANKS or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"world_size must be from 1 to {MAX_RANKS} and rank below it, not {self.world_size} and {self.rank}"
            )
        if self.world_size > 1:
            self._check_ranks()
        elif self.local_ranks != 1:
            raise ValueError("local_ranks needs world_size: how many ranks there are on all machines")
        if problem := quantization.problem(self.quantization, self.device):
            raise ValueError(problem)
        self.check_telemetry()
        if bool(self.curve_key) != bool(self.curve_server_key):
            raise ValueError("curve_key and curve_server_key go together: give both, or neither")
        if not 0 <= self.drain_s < 86_400:
            raise ValueError(f"drain_s must be from 0 to a day, not {self.drain_s:g}")
        if not 0 <= self.max_adapters <= MAX_ADAPTERS:
            raise ValueError(f"max_adapters must be from 0 to {MAX_ADAPTERS}, not {self.max_adapters}")
        for name in ("kv_cache_memory", "max_model_len", "num_threads", "packed_cache_limit", "adapter_memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"speculative_tokens must be from 0 to {MAX_SPECULATIVE_TOKENS}, not {self.speculative_tokens}"
            )

    def _check_ranks(self) -> None:
        if self.device == "cpu":
            raise ValueError(
                "device cpu does not split a model over processes: it uses all cores of a machine in one; "
                "take away world_size, or try device reference"
            )
        if not 1 <= self.local_ranks <= self.world_size or self.world_size % self.local_ranks:
            raise ValueError(f"local_ranks must divide world_size ({self.world_size}), not {self.local_ranks}")
        if not 0 <= self.node_rank < self.world_size // self.local_ranks:
            raise ValueError(
                f"node_rank must be below world_size / local_ranks ({self.world_size // self.local_ranks}), not "
                f"{self.node_rank}"
            )
        if self.rank_timeout_s <= 0:
            raise ValueError(f"rank_timeout_s must be positive, not {self.rank_timeout_s:g}")
        parts = urlsplit(self.rendezvous)
        try:
            named = parts.scheme == "ipc" or (parts.scheme == "tcp" and bool(parts.port))
        except ValueError:
            named = False
        if not named:
            raise ValueError(f"rendezvous must be ipc://PATH or tcp://ADDRESS:PORT, not {self.rendezvous!r}")
        if parts.scheme == "tcp" and parts.hostname in (None, "*", "0.0.0.0", "::"):
            raise ValueError(
                f"rendezvous {self.rendezvous!r} means every interface, and whoever reaches it can end the group: name "
                "the address of one interface"
            )
