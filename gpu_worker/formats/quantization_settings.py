"""Reads `quantization_config` of a config.json: in which layouts a checkpoint's matrices are. Needs no torch.

What is not understood is refused by name. Which of the matrices are quantised, their tensors say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.tensor_kinds import Settings

Json = Mapping[str, Any]


class _Values:
    """The values of an object, each checked; messages name it by its path."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ModelError(f"{where} is {shown(values)}, expected an object")
        self._values, self._where = values, where

    def inner(self, key: str) -> _Values:
        return _Values(self._values.get(key), f"{self._where}.{key}")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def one_of(self, key: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        """Return a value that must be one of some; `default` where it is missing or null."""
        value = self._values.get(key)
        value = default if value is None else value
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            supported = ", ".join(str(choice) for choice in choices)
            raise ModelError(f"{self._where}.{key} is {shown(value)}, supported: {supported}")
        return value

    def refuse(self, *keys: str) -> None:
        """Raise ModelError if one of `keys` is set to anything."""
        for key in keys:
            if self._values.get(key):
                raise ModelError(f"{self._where}.{key} is {shown(self._values[key])}, which is not supported")

    def size(self, key: str, default: int = 0) -> int:
        """Return a number of values, 0 for all of a row."""
        value = self._values.get(key)
        value = default if value is None else value
        if type(value) is not int or not (value == -1 or 0 <= value <= 1 << 20):
            raise ModelError(f"{self._where}.{key} is {shown(value)}, expected a number of inputs, or -1")
        return max(value, 0)

    def block(self, key: str) -> tuple[int, ...]:
        """Return outputs and inputs of a block; empty if there are none."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n <= 4096 for n in value):
            raise ModelError(f"{self._where}.{key} is {shown(value)}, expected two sizes")
        return tuple(value)


def _gptq(read: _Values) -> Settings:
    read.refuse("dynamic", "extra_config", "is_marlin_format", "adapter")
    read.one_of("pack_dtype", ("int32",), "int32")
    layout = read.one_of("checkpoint_format", ("gptq", "gptq_v2"), read.get("format") or "gptq")
    return Settings(
        "gptq",
        ("gptq",),
        read.one_of("bits", (2, 4, 8)),
        read.size("group_size", -1),
        read.one_of("sym", (True, False), True),
        read.one_of("desc_act", (True, False), False),
        zero_shift=int(layout == "gptq"),
    )


def _awq(read: _Values) -> Settings:
    read.refuse("extra_config")
    read.one_of("version", ("gemm", "GEMM"), "gemm")
    bits = read.one_of("bits", (4,), read.get("w_bit"))
    size = read.size("group_size", read.get("q_group_size") or -1)
    return Settings("awq", ("awq",), bits, size, symmetric=False)


def _auto_round(read: _Values) -> Settings:
    layouts: dict[str, Callable[[_Values], Settings]] = {"auto_round:auto_gptq": _gptq, "auto_round:auto_awq": _awq}
    read.one_of("data_type", ("int",), "int")
    return layouts[read.one_of("packing_format", tuple(layouts))](read)


def _fp8(read: _Values) -> Settings:
    read.one_of("fmt", ("e4m3",), "e4m3")
    read.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    return Settings("fp8", ("bytes",), block=read.block("weight_block_size"))


# By the format of compressed-tensors: the layout, and the bits and the type of its codes.
_COMPRESSED: dict[str, tuple[str, tuple[int, ...], str]] = {
    "pack-quantized": ("packed words", (4, 8), "int"),
    "int-quantized": ("bytes", (8,), "int"),
    "naive-quantized": ("bytes", (8,), "int"),
    "float-quantized": ("bytes", (8,), "float"),
    "mxfp4-pack-quantized": ("mxfp4", (4,), "float"),
}


def _compressed_tensors(read: _Values) -> Settings:
    read.refuse("kv_cache_scheme", "transform_config")
    if (sparsity := read.get("sparsity_config")) and _Values(sparsity, "sparsity_config").get("format") != "dense":
        read.refuse("sparsity_config")
    read.one_of("quantization_status", ("compressed",), "compressed")
    groups = read.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        read.refuse("config_groups")
        raise ModelError("quantization_config.config_groups is missing")
    found = {_of_group(read, read.inner("config_groups").inner(name)) for name in groups}
    if len(found) > 1:
        raise ModelError("quantization_config.config_groups quantise weights in several ways, which is not supported")
    return found.pop()


def _of_group(read: _Values, group: _Values) -> Settings:
    """Return the settings of one group of layers."""
    name = group.get("format") or read.get("format")
    if not isinstance(name, str) or name not in _COMPRESSED:
        raise ModelError(f"quantization_config.format is {shown(name)}, supported: {', '.join(_COMPRESSED)}")
    layout, bits, kind = _COMPRESSED[name]
    weights = group.inner("weights")
    weights.one_of("type", (kind,))
    weights.one_of("dynamic", (False,), False)
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), "tensor")
    return Settings(
        "compressed-tensors",
        (layout,),
        weights.one_of("num_bits", bits),
        weights.size("group_size") if strategy == "group" else 0,
        is_ordered=weights.one_of("actorder", ("group", "weight", "static", False), False) == "group",
        block=weights.block("block_structure") if strategy == "block" else (),
    )


def _mxfp4(_: _Values) -> Settings:
    return Settings("mxfp4", ("mxfp4",), 4)


_METHODS: dict[str, Callable[[_Values], Settings]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
}


def quantization_of(values: Json, where: str) -> Settings | None:
    """Return what a parsed config.json says of quantised matrices, None if nothing. Raises ModelError."""
    if not (found := values.get("quantization_config")):
        return None
    try:
        read = _Values(found, "quantization_config")
        method = read.get("quant_method") or read.get("quant_algo")
        if not isinstance(method, str) or method not in _METHODS:
            raise ModelError(
                f"the checkpoint is quantised as {shown(method)} (quantization_config), which is not supported; "
                f"supported are {', '.join(_METHODS)}; or use the unquantised checkpoint or a GGUF file"
            )
        return _METHODS[method](read)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
