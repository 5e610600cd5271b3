"""A packed model as one file. Nothing in it is believed before it is checked.

preamble     magic, the description's offset and length, its SHA-256
weights      from byte 4096 on, each piece at a multiple of 64 bytes
description  JSON: the key that the file was written under, the program, a checksum of each MiB of weights
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octavo.gpu_worker.devices.packed_model import PackedModel, PackedValue
from octavo.gpu_worker.ops import Heads
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Arena, Runtime, checksums_of, padded, read_file

FORMAT = b"octavo packed 2\n"
_PREAMBLE = struct.Struct("<16sQQ32s")
_WEIGHTS_START = 4096
_ALIGNMENT = 64
_MAX_DESCRIPTION_BYTES = 256 << 20


class DamagedError(Exception):
    """The file is not whole, not of this format, or of another key."""


def write(file: int, key: str, facts: Mapping[str, Any], packed: PackedModel) -> int:
    """Write a whole file to an open, empty one and wait until it is on the disk; return its size. Raises OSError."""
    offsets: dict[int, int] = {}
    num_bytes = 0
    sizes = dict(packed.memory.pieces)
    ops = (library.Op * len(packed.ops))(*packed.ops)
    for struct_, field in _pointers(ops):
        address = getattr(struct_, field)
        if address not in offsets:
            offsets[address] = num_bytes
            _write_all(file, _view(address, sizes[address]), _WEIGHTS_START + num_bytes)
            num_bytes += padded(sizes[address], _ALIGNMENT)
        setattr(struct_, field, offsets[address] + 1)  # 0 stays null
    os.ftruncate(file, _WEIGHTS_START + num_bytes)
    with mmap.mmap(file, _WEIGHTS_START + num_bytes, access=mmap.ACCESS_READ) as written:
        checksums = checksums_of(packed.runtime, np.frombuffer(written, np.uint8, num_bytes, _WEIGHTS_START))
    description = {
        "key": key,
        "facts": dict(facts),
        "num_layers": packed.num_layers,
        "heads": [packed.heads.num_heads, packed.heads.num_kv_heads, packed.heads.head_dim],
        "vocab_size": packed.vocab_size,
        "values": [[value.columns, value.is_float] for value in packed.values],
        "ops": base64.b64encode(bytes(ops)).decode(),
        "num_bytes": num_bytes,
        "checksums": checksums,
    }
    text = json.dumps(description).encode()
    _write_all(file, text, _WEIGHTS_START + num_bytes)
    _write_all(file, _PREAMBLE.pack(FORMAT, _WEIGHTS_START + num_bytes, len(text), hashlib.sha256(text).digest()), 0)
    os.fsync(file)
    return _WEIGHTS_START + num_bytes + len(text)


def read(file: int, key: str, runtime: Runtime) -> tuple[dict[str, Any], PackedModel]:
    """Return the facts and the model of an open file. Raises DamagedError, OSError, MemoryError.

    The weights are read into memory of their own and not mapped: so they get huge pages, which a
    step that streams all of them needs, and nothing that happens to the file later can reach them.
    """
    description = _read_description(file)
    if description.get("key") != key:
        raise DamagedError("it was written under another key")
    try:
        num_bytes = int(description["num_bytes"])
        ops = _ops_of(base64.b64decode(description["ops"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"its description is incomplete ({error})") from error
    memory = Arena(runtime)
    base = memory.allocate(num_bytes)
    if read_file(runtime, file, _WEIGHTS_START, base, num_bytes) != description["checksums"]:
        raise DamagedError("a checksum of the weights is wrong")
    for struct_, field in _pointers(ops):
        setattr(struct_, field, base + getattr(struct_, field) - 1)
    model = PackedModel(
        description["num_layers"],
        Heads(*description["heads"]),
        description["vocab_size"],
        runtime,
        memory,
        tuple(ops),
        tuple(PackedValue(columns, is_float) for columns, is_float in description["values"]),
    )
    return description["facts"], model


def _read_description(file: int) -> dict[str, Any]:
    size = os.fstat(file).st_size
    preamble = os.pread(file, _PREAMBLE.size, 0)
    if len(preamble) != _PREAMBLE.size:
        raise DamagedError("it is cut off")
    magic, offset, length, digest = _PREAMBLE.unpack(preamble)
    if magic != FORMAT:
        raise DamagedError("it is of another format")
    if offset + length != size or length > _MAX_DESCRIPTION_BYTES:
        raise DamagedError("its size is wrong")
    text = os.pread(file, length, offset)
    if hashlib.sha256(text).digest() != digest:
        raise DamagedError("the checksum of its description is wrong")
    description: dict[str, Any] = json.loads(text)
    return description


def _ops_of(data: bytes) -> Any:
    return (library.Op * (len(data) // ctypes.sizeof(library.Op))).from_buffer_copy(data)


def _pointers(structs: Any) -> Iterator[tuple[Any, str]]:
    """Yield (struct, name of field) for each pointer in an array of structs that is not null."""
    for struct_ in structs:
        for name, kind in struct_._fields_:
            value = getattr(struct_, name)
            if isinstance(value, ctypes.Structure):
                yield from _pointers([value])
            elif kind is ctypes.c_void_p and value:
                yield struct_, name


def _view(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
