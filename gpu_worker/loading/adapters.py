"""Reads LoRA adapters in PEFT's layout and checks them against the model that they are to be added to.

Nothing in the files is believed: every tensor has a module, a partner, the shape that both want, and finite values.
Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.common.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterError, AdapterFiles
from octavo.gpu_worker.errors import shown
from octavo.gpu_worker.ops import Float32Array, LoraPair

MAX_RANK = 256
_MAX_BF16 = 3.3895313892515355e38  # a float32 beyond it would be rounded to infinity
_MAX_HEAD_BYTES = 8 << 20
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TENSOR = re.compile(r"base_model\.model\.([\w.]{1,300})\.lora_([AB])(?:\.default)?\.weight")
# Keys that change what an adapter computes, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    # The others (pissa, olora, corda, loftq ...) change the model's own weights, until the adapter is converted.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_bdlora": (False, None, {}),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
_ADVICE = "merge it into its model (merge_and_unload), or train it without"


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, int]
    start: int


class PeftAdapter:
    """An adapter whose files fit a model. Its values are checked when `pairs` reads them.

    num_values  how many numbers its matrices have
    """

    def __init__(self, files: AdapterFiles, modules: Mapping[str, tuple[int, int]]) -> None:
        """Check everything but the values. Raises AdapterError. modules: (out_features, in_features) by name."""
        self._files = files
        self._config = _read_config(files.config)
        self._data_start, tensors = _read_head(files.weights)
        self._pairs = self._match(tensors, modules)
        self.num_values = sum(
            tensor.shape[0] * tensor.shape[1] for pair in self._pairs.values() for tensor in pair.values()
        )

    def pairs(self) -> Iterator[LoraPair]:
        """Read pair after pair. Raises AdapterError for a value that is not finite, or would not be in bfloat16."""
        for module, pair in self._pairs.items():
            a, b = self._values(module, "A", pair["A"]), self._values(module, "B", pair["B"])
            yield LoraPair(module, a, b, self._config.scale(module, len(a)))

    def _match(
        self, tensors: Mapping[str, _Tensor], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, dict[str, _Tensor]]:
        pairs: dict[str, dict[str, _Tensor]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise _wrong(
                    f"tensor {shown(name)} is none of base_model.model.MODULE.lora_A.weight and lora_B.weight; what "
                    f"else adapters can hold (DoRA, biases, embeddings, saved modules) is not served: {_ADVICE}"
                )
            module, which = match.groups()
            if module not in modules:
                raise _wrong(
                    f"is for {module}, to which the model that is served takes no adapter: it has "
                    f"{', '.join(sorted({each.rpartition('.')[2] for each in modules}))} in "
                    f"{len({each.rsplit('.', 2)[0] for each in modules})} layers"
                )
            if which in pairs.setdefault(module, {}):
                raise _wrong(f"has {module}.lora_{which} twice")
            pairs[module][which] = tensor
        if not pairs:
            raise _wrong("holds no tensors")
        for module, pair in pairs.items():
            self._check_pair(module, pair, *modules[module])
        return pairs

    def _check_pair(self, module: str, pair: Mapping[str, _Tensor], out_features: int, in_features: int) -> None:
        if len(pair) != 2:
            raise _wrong(f"has {module}.lora_{next(iter(pair))} and not its partner")
        rank = pair["A"].shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise _wrong(f"{module}: rank {rank}; from 1 to {MAX_RANK} are served")
        wanted = self._config.rank(module)
        if rank != wanted:
            raise _wrong(f"{module}: rank {rank}, but {CONFIG_FILE} says {wanted}")
        for which, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            if pair[which].shape != shape:
                raise _wrong(
                    f"{module}.lora_{which} is {list(pair[which].shape)}, and for this model it must be {list(shape)}: "
                    "the adapter is of another model"
                )

    def _values(self, module: str, which: str, tensor: _Tensor) -> Float32Array:
        """Return a matrix as float32."""
        count = tensor.shape[0] * tensor.shape[1]
        start = self._data_start + tensor.start
        raw = memoryview(self._files.weights)[start : start + count * _BYTES[tensor.dtype]]
        values: Float32Array
        if tensor.dtype == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, "<f2" if tensor.dtype == "F16" else "<f4").astype(np.float32)
        largest = max(abs(float(values.min())), abs(float(values.max())))  # not a number, if one of them is not
        if not math.isfinite(largest):
            raise _wrong(f"{module}.lora_{which} holds a value that is not finite")
        if largest > _MAX_BF16:
            raise _wrong(f"{module}.lora_{which} holds {largest:g}, and bfloat16 ends at {_MAX_BF16:g}")
        return values.reshape(tensor.shape)


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says of ranks and scales; patterns have module names, or their ends, as keys."""

    r: int
    alpha: float
    uses_rslora: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def rank(self, module: str) -> float:
        """Return the rank of a module."""
        return _of_module(self.ranks, module, self.r)

    def scale(self, module: str, rank: int) -> float:
        """Return what a module's product is multiplied by."""
        return _of_module(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.uses_rslora else rank)


def _of_module(pattern: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in pattern.items() if module == key or module.endswith(f".{key}")), default)


def _read_config(data: bytes) -> _Config:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_FILE}: cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE}: expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE}: peft_type is {shown(config.get('peft_type'))}; only LORA is served")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise AdapterError(f"{CONFIG_FILE}: {key} is {shown(config[key])}, which is not served: {_ADVICE}")
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise AdapterError(f"{CONFIG_FILE}: use_rslora is {shown(rslora)}; expected true or false")
    r = _number(config, "r")
    if not r.is_integer():
        raise AdapterError(f"{CONFIG_FILE}: r is {shown(config['r'])}; expected a whole number")
    return _Config(
        int(r),
        _number(config, "lora_alpha"),
        rslora,
        _pattern(config, "rank_pattern"),
        _pattern(config, "alpha_pattern"),
    )


def _number(values: Mapping[str, Any], key: str, within: str = "") -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise AdapterError(
            f"{CONFIG_FILE}: {within}{shown(key)} is {shown(value)}; expected a number above 0 and up to 1000000"
        )
    return float(value)


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, float]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {shown(pattern)}; expected an object")
    for name in pattern:
        if not re.fullmatch(r"\^?[\w.]{1,300}", name):
            raise AdapterError(
                f"{CONFIG_FILE}: {key} has the key {shown(name)}; only names of modules are read, no expressions"
            )
    return {name.removeprefix("^"): _number(pattern, name, f"{key}: ") for name in pattern}


def _read_head(data: bytearray) -> tuple[int, dict[str, _Tensor]]:
    """Return where the values begin, and the tensors, which lie within the file. Raises AdapterError."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEAD_BYTES):
        raise _wrong("not a whole safetensors file")
    try:
        head = json.loads(bytes(data[8 : 8 + size]))
        listed = {name: each for name, each in head.items() if name != "__metadata__"}
        tensors = {name: _tensor(name, each, len(data) - 8 - size) for name, each in listed.items()}
    except AdapterError as error:
        raise _wrong(f"{error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _wrong(f"not a whole safetensors file ({type(error).__name__})") from None
    return 8 + size, tensors


def _tensor(name: str, listed: Mapping[str, Any], num_bytes: int) -> _Tensor:
    (start, end), dtype = listed["data_offsets"], listed["dtype"]
    if dtype not in _BYTES:
        raise AdapterError(f"tensor {shown(name)} is of type {shown(dtype)}; expected {', '.join(_BYTES)}")
    if len(listed["shape"]) != 2 or not all(type(number) is int and number > 0 for number in listed["shape"]):
        raise AdapterError(f"tensor {shown(name)} has the shape {shown(listed['shape'])}; expected a matrix")
    rows, columns = listed["shape"]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= num_bytes:
        raise AdapterError(f"tensor {shown(name)} lies outside of the file")
    if end - start != rows * columns * _BYTES[dtype]:
        raise AdapterError(f"tensor {shown(name)} has {end - start} bytes for {rows} x {columns} values")
    return _Tensor(dtype, (rows, columns), start)


def _wrong(problem: str) -> AdapterError:
    return AdapterError(f"{WEIGHTS_FILE}: {problem}")
