"""What a section is given: the device, the sizes to use, what was measured before."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.configs import LINEAR_KINDS, LinearKind
from octavo.kernels.gpu import gpu_target
from tools.kernels.timing import Timer


@dataclass(frozen=True)
class Lab:
    """Where sections run.

    interpreted  Triton's interpreter in place of a GPU
    tiny         sizes that the interpreter can do in a moment; times mean nothing
    model        a model's folder or file; None: a small random one
    ceilings     `copy` in GB/s and products in TFLOP/s by type (`bf16`, `int8`, `fp8`), measured or assumed
    """

    interpreted: bool = False
    tiny: bool = False
    model: Path | None = None
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where tensors are; the interpreter works on the CPU's."""
        return "cpu" if self.interpreted else "cuda"

    @property
    def target(self) -> str:
        """What kernels are configured for; the interpreter takes those of an H100."""
        return "cuda:90" if self.interpreted else gpu_target()

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations; the interpreter cannot compute in bfloat16."""
        return torch.float16 if self.interpreted else torch.bfloat16

    @property
    def linear_kinds(self) -> tuple[LinearKind, ...]:
        """The quantised layers that can be run: the interpreter rounds to fp8 wrongly, so it does without fp8_fp8."""
        kinds = LINEAR_KINDS[self.target]
        return tuple(kind for kind in kinds if kind != "fp8_fp8") if self.interpreted else kinds

    def timer(self) -> Timer:
        """Return what times launches."""
        return Timer(self.device, repeats=1 if self.tiny else 30)

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return `full`, or `tiny` where sizes must be."""
        return tiny if self.tiny else full


def describe(lab: Lab) -> dict[str, Any]:
    """Return what a reader of figures must know of the machine."""
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if lab.interpreted:
        return {"card": "none: Triton's interpreter, tiny sizes", **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        **versions,
    }


def _driver() -> str:
    import subprocess

    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"
