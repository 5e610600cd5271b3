"""Which configurations fit a GPU of this machine."""

from __future__ import annotations

import torch

from octavo.kernels.configs import cuda_target


def gpu_target(device: torch.device | str = "cuda") -> str:
    """Return the target of `configs.TARGETS` for a GPU. Raises ValueError if kernels are made for none like it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        if not properties.gcnArchName.startswith("gfx94"):
            raise ValueError(f"kernels are made for gfx942, this GPU is {properties.gcnArchName}")
        return "hip:gfx942"
    target = cuda_target(properties.major, properties.minor)
    if target is None:
        raise ValueError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, 8.0 or above is needed"
        )
    return target
