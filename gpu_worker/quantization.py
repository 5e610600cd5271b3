"""In how many bits the weights of linear layers are kept: as they are stored, or quantised while a model is loaded.

Which device does what, and how a wrong wish is told. How weights are quantised is a device's business, beside its
kernels. Norms, biases and what chooses experts keep their type under every scheme; so do embeddings and the head of
device cuda, which have eight bits on cpu.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Quantization(StrEnum):
    """A scheme; its value is what `--quantization` is given."""

    NONE = "none"
    INT8 = "int8"  # whole numbers from -127 to 127
    INT4 = "int4"  # whole numbers of four bits
    FP8 = "fp8"  # float8_e4m3fn


MIN_BYTES_OF_CODES = 256 << 20
"""A smaller quantised file is computed in bfloat16: its model loses more to activations of eight bits, and fits."""

QUANTIZATIONS: Final = tuple(scheme.value for scheme in Quantization)

_SCHEMES: Final[dict[str, tuple[Quantization, ...]]] = {
    "cuda": (Quantization.INT8, Quantization.FP8),
    "cpu": (Quantization.INT8, Quantization.INT4),
    "reference": (),
}
"""The schemes of each device, besides none."""


def takes_codes(dtype: str, num_bytes: int) -> bool:
    """Return whether device cpu computes from the codes of a quantised file of so many bytes, without a scheme."""
    return dtype == "auto" and num_bytes >= MIN_BYTES_OF_CODES


def problem(scheme: str, device: str) -> str:
    """Return why a device cannot quantise weights so, and what to change; empty if it can.

    scheme  a value of `Quantization`
    device  of `devices.DEVICES`; "auto" can do what any device can
    """
    if scheme not in QUANTIZATIONS:
        return f"quantization {scheme!r} is not one of {', '.join(QUANTIZATIONS)}"
    if scheme == Quantization.NONE:
        return ""
    devices = [name for name, schemes in _SCHEMES.items() if scheme in schemes]
    if device != "auto" and device not in devices:
        return f"quantization {scheme} is not for device {device}: {_advice(device, devices)}"
    return ""


def _advice(device: str, devices: list[str]) -> str:
    """Return what to take instead: another scheme, or another device."""
    own = [Quantization.NONE, *_SCHEMES.get(device, ())]
    schemes = "use " + " or ".join(scheme.value for scheme in own)
    return f"{schemes}, or device {' or '.join(devices)}" if devices else schemes
