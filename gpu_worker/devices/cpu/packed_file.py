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
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from octavo.gpu_worker.devices.cpu.packed_checks import ALIGNMENT, ProgramError, check_modules, check_program
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel, PackedValue
from octavo.gpu_worker.ops import Heads, Module
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Arena, Runtime, checksums_of, padded, read_file

FORMAT = b"octavo packed 3\n"
FACTS = {"architecture": str, "max_model_len": int, "model_version": str}
_PREAMBLE = struct.Struct("<16sQQ32s")
_WEIGHTS_START = 4096
_MAPPED_BYTES = 16 * library.CHUNK_BYTES
_MAX_DESCRIPTION_BYTES = 256 << 20
_CHECKSUM_DIGITS = 22  # of 64 bits at most, with what is between two
_FACTS_BYTES = 4096  # at most, with all the rest of a description that is short
_VALUE_BYTES = 32


class DamagedError(Exception):
    """The file is not whole, not of this format, or of another key."""


def write(file: int, key: str, facts: Mapping[str, Any], packed: PackedModel) -> int:
    """Write a whole file to an open, empty one and wait until it is on the disk; return its size. Raises OSError."""
    ops, pieces, num_bytes = _laid_out(packed)
    for address, (offset, size) in pieces.items():
        _write_all(file, _view(address, size), _WEIGHTS_START + offset)
    os.ftruncate(file, _WEIGHTS_START + num_bytes)
    checksums = []
    for start in range(0, num_bytes, _MAPPED_BYTES):  # in pieces: what is mapped counts as memory of the process
        size = min(_MAPPED_BYTES, num_bytes - start)
        with mmap.mmap(file, size, access=mmap.ACCESS_READ, offset=_WEIGHTS_START + start) as written:
            checksums += checksums_of(packed.runtime, np.frombuffer(written, np.uint8))
    description = {
        "key": key,
        "facts": dict(facts),
        "num_layers": packed.num_layers,
        "heads": list(astuple(packed.heads)),
        "vocab_size": packed.vocab_size,
        "values": [[value.columns, value.is_float] for value in packed.values],
        "ops": base64.b64encode(bytes(ops)).decode(),
        "modules": [
            [op, [[module.name, module.out_features] for module in modules]] for op, modules in packed.modules.items()
        ],
        "num_bytes": num_bytes,
        "checksums": checksums,
    }
    text = json.dumps(description).encode()
    _write_all(file, text, _WEIGHTS_START + num_bytes)
    _write_all(file, _PREAMBLE.pack(FORMAT, _WEIGHTS_START + num_bytes, len(text), hashlib.sha256(text).digest()), 0)
    os.fsync(file)
    return _WEIGHTS_START + num_bytes + len(text)


def size_of(packed: PackedModel) -> int:
    """Return how many bytes `write` writes at most."""
    ops, _, num_bytes = _laid_out(packed)
    num_checksums = math.ceil(num_bytes / library.CHUNK_BYTES)
    description = (
        len(base64.b64encode(bytes(ops))) + _CHECKSUM_DIGITS * num_checksums + _VALUE_BYTES * len(packed.values)
    )
    description += sum(
        len(json.dumps([each.name])) + _VALUE_BYTES for of_op in packed.modules.values() for each in of_op
    )
    return _WEIGHTS_START + num_bytes + description + _VALUE_BYTES * len(packed.modules) + _FACTS_BYTES


def _laid_out(packed: PackedModel) -> tuple[Any, dict[int, tuple[int, int]], int]:
    """Return the program with offsets in place of pointers, (offset, size) of each address, and the bytes of all."""
    pieces: dict[int, tuple[int, int]] = {}
    num_bytes = 0
    sizes = dict(packed.memory.pieces)
    ops = (library.Op * len(packed.ops))(*packed.ops)
    for struct_, field in _pointers(ops):
        address = getattr(struct_, field)
        if address not in pieces:
            pieces[address] = num_bytes, sizes[address]
            num_bytes += padded(sizes[address], ALIGNMENT)
        setattr(struct_, field, pieces[address][0] + 1)  # 0 stays null
    return ops, pieces, num_bytes


def read(file: int, key: str, runtime: Runtime) -> tuple[dict[str, Any], PackedModel]:
    """Return the facts and the model of an open file. Raises DamagedError, OSError, MemoryError.

    The weights are read into memory of their own and not mapped: so they get huge pages, which a
    step that streams all of them needs, and nothing that happens to the file later can reach them.
    """
    description = _read_description(file)
    if description.get("key") != key:
        raise DamagedError("it was written under another key")
    try:
        facts = _facts_of(description["facts"])
        num_layers, vocab_size, num_bytes = (description[name] for name in ("num_layers", "vocab_size", "num_bytes"))
        heads = Heads(*description["heads"])
        ops = _ops_of(base64.b64decode(description["ops"]))
        values = tuple(PackedValue(columns, is_float) for columns, is_float in description["values"])
        if num_bytes != description["offset"] - _WEIGHTS_START:
            raise ValueError(f"{num_bytes} bytes of weights")
        check_program(ops, values, num_layers, heads, vocab_size, num_bytes, runtime)
        modules = {op: tuple(Module(*each) for each in listed) for op, listed in description["modules"]}
        check_modules(ops, modules)
    except ProgramError as error:
        raise DamagedError(f"its program cannot run: {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"its description is incomplete ({error})") from error
    memory = Arena(runtime)
    base = memory.allocate(num_bytes)
    if read_file(runtime, file, _WEIGHTS_START, base, num_bytes) != description["checksums"]:
        raise DamagedError("a checksum of the weights is wrong")
    for struct_, field in _pointers(ops):
        setattr(struct_, field, base + getattr(struct_, field) - 1)
    return facts, PackedModel(num_layers, heads, vocab_size, runtime, memory, tuple(ops), values, modules)


def _facts_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts if they are of the types that a model's are. Raises ValueError."""
    if {name: type(value) for name, value in facts.items()} != FACTS:
        raise ValueError(f"facts {facts}")
    return facts


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
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its description is no JSON ({error})") from error
    if not isinstance(description, dict):
        raise DamagedError("its description is no object")
    return {**description, "offset": offset}


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
