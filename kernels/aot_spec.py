"""What a kernel's module says about how its kernels are to be compiled without a GPU (`tools/kernels/aot.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.kernels.configs import ROW_TARGETS


@dataclass(frozen=True)
class AotSpec:
    """One kernel in one configuration.

    function    name of the `@triton.jit` function in the module that holds the spec
    label       tells this configuration from others of the function
    signature   type of each argument that is no constexpr. `*bf16`: pointer; a `:16` behind a type
                says that the value is a multiple of 16, as the pointers and strides of tensors are;
                `tensordesc<bf16[64,128]>`: a descriptor of blocks of that shape
    constexprs  value of each constexpr
    targets     of `configs.TARGETS`
    require     least number of instructions of a kind: "mma" (matrix), "wgmma" (of those, the ones
                of a warp group or of tensor memory), "ld128" (16-byte loads of global memory), "tma"
                (loads through a tensor descriptor)
    min_blocks  least number of blocks that must fit on a multiprocessor, by registers and shared memory
    """

    function: str
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    enable_fp_fusion: bool = True
    targets: tuple[str, ...] = ROW_TARGETS
    require: Mapping[str, int] = field(default_factory=dict)
    min_blocks: int = 2

    @property
    def name(self) -> str:
        """What the table of `aot.py` shows."""
        return f"{self.function.strip('_')} {self.label}".strip()
